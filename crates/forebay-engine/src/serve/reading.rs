//! How output is read: text into content, reasoning and calls of tools, in the form that this model writes them.

use std::sync::Arc;

use forebay_calls::{CallStyle, Function, Parser, THINK, THINK_END, ThinkStyle};
use forebay_tokens::{TextModel, Tokenizer};
use forebay_types::{Fault, FinishReason, TokenId};
use forebay_wire::{Api, Delta, Generate, Prompt, ToolCallDelta, ToolChoice};
use serde_json::Value;

use crate::config::{ReasoningParser, ToolCallParser};

/// Enough for `<think>` in any vocabulary, and the line breaks behind it.
const PROMPT_END_TOKENS: usize = 24;

/// What forms a model has. Fixed once it is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Forms {
    calls: Option<CallStyle>,
    reasoning: ReasoningParser,
    /// The chat template has the tags of reasoning.
    template_thinks: bool,
}

impl Forms {
    pub fn new(text: &TextModel, calls: ToolCallParser, reasoning: ReasoningParser) -> Self {
        let template = text.template();
        let has = |tag| template.source().contains(tag);
        let calls = match calls {
            ToolCallParser::None => None,
            ToolCallParser::Hermes => Some(CallStyle::Hermes),
            ToolCallParser::Llama3Json => Some(CallStyle::Llama3Json),
            ToolCallParser::Json => Some(CallStyle::Json),
            // A template without tools gets them in the form of Hermes.
            ToolCallParser::Auto if has("<tool_call>") || !template.shows_tools() => Some(CallStyle::Hermes),
            ToolCallParser::Auto if has("<|python_tag|>") || has("<|start_header_id|>") => {
                Some(CallStyle::Llama3Json)
            }
            ToolCallParser::Auto => Some(CallStyle::Json),
        };
        Self { calls, reasoning, template_thinks: has(THINK) || has(THINK_END) }
    }

    /// How the output of this call is read. `prompt` is the (only) prompt of a chat.
    ///
    /// # Errors
    /// `tool_choice` where tools are to be called and this engine reads no calls.
    pub fn reading(
        &self,
        call: &Generate,
        prompt: &[TokenId],
        tokenizer: &Tokenizer,
    ) -> Result<Option<Reading>, Fault> {
        let Prompt::Chat { tools, .. } = &call.prompt else { return Ok(None) };
        debug_assert_eq!(call.api, Api::ChatCompletions);
        let calls = match (tools, &call.tool_choice) {
            (None, _) | (_, ToolChoice::None) => None,
            (Some(_), _) => Some(self.calls.ok_or_else(no_calls)?),
        };
        let think = self.thinking(prompt, tokenizer);
        if calls.is_none() && think.is_none() {
            return Ok(None);
        }
        let tags =
            calls.into_iter().flat_map(CallStyle::tags).chain(think.iter().flat_map(|_| &[THINK, THINK_END]));
        let shown = tags.filter_map(|tag| tokenizer.id_of(tag)).collect();
        let random = getrandom::u64().map_err(|error| Fault::internal(format!("no randomness: {error}")))?;
        Ok(Some(Reading {
            calls,
            think,
            shown,
            think_token: tokenizer.id_of(THINK).filter(|_| think == Some(ThinkStyle::Tagged)),
            include_reasoning: call.include_reasoning,
            parallel: call.parallel_tool_calls,
            is_wanted: matches!(call.tool_choice, ToolChoice::Required | ToolChoice::Function(_)),
            is_named: matches!(call.tool_choice, ToolChoice::Function(_)),
            random,
        }))
    }

    fn thinking(&self, prompt: &[TokenId], tokenizer: &Tokenizer) -> Option<ThinkStyle> {
        let ends_with = |tag| {
            let end = &prompt[prompt.len().saturating_sub(PROMPT_END_TOKENS)..];
            tokenizer.decode(end, false).trim_end().ends_with(tag)
        };
        match self.reasoning {
            ReasoningParser::None => None,
            ReasoningParser::Auto if !self.template_thinks => None,
            ReasoningParser::Auto | ReasoningParser::Qwen3 => {
                Some(if ends_with(THINK) { ThinkStyle::Open } else { ThinkStyle::Tagged })
            }
            // Closed already where thinking was switched off.
            ReasoningParser::DeepseekR1 => {
                Some(if ends_with(THINK_END) { ThinkStyle::Tagged } else { ThinkStyle::Open })
            }
        }
    }
}

fn no_calls() -> Fault {
    Fault::bad_request(
        "tools can't be called with this model: `engine.tool-call-parser` is `none`; leave out 'tools', or set \
         'tool_choice' to 'none'",
    )
    .param("tool_choice")
}

/// How the output of one call is read.
#[derive(Debug, Clone)]
pub(crate) struct Reading {
    calls: Option<CallStyle>,
    think: Option<ThinkStyle>,
    /// Control tokens that are tags, and so give text.
    pub shown: Arc<[TokenId]>,
    think_token: Option<TokenId>,
    include_reasoning: bool,
    parallel: bool,
    /// Only calls come.
    is_wanted: bool,
    /// A function was named: as with OpenAI and in vLLM, its call finishes with `stop`.
    is_named: bool,
    /// In the ids of this call's calls.
    random: u64,
}

impl Reading {
    /// The grammar of the output, where the client holds its calls to one: those that it wants whatever the model would rather
    /// do, and those of strict functions.
    pub fn grammar(&self, call: &Generate, tokenizer: &Tokenizer) -> Option<String> {
        let style = self.calls?;
        let Prompt::Chat { tools: Some(Value::Array(tools)), .. } = &call.prompt else { return None };
        let functions = tools.iter().filter_map(function);
        let control = |tag: &str| tokenizer.id_of(tag).filter(|&id| tokenizer.is_special(id));
        match &call.tool_choice {
            ToolChoice::Required => {
                Some(style.grammar(&functions.collect::<Vec<_>>(), self.parallel, control))
            }
            ToolChoice::Function(name) => {
                let named: Vec<Function> = functions.filter(|f| f.name == *name).take(1).collect();
                Some(style.grammar(&named, false, control))
            }
            // Another constraint is on all of the output, calls or not.
            ToolChoice::Auto if call.constraint.is_none() => {
                let functions: Vec<Function> = functions.collect();
                let strict = functions.iter().any(|function| function.strict);
                if strict { style.grammar_behind_text(&functions, self.parallel, control) } else { None }
            }
            ToolChoice::Auto | ToolChoice::None => None,
        }
    }

    pub fn choice(&self, number: u32) -> Reader {
        Reader { parser: Parser::new(self.calls, self.think), reading: self.clone(), number }
    }
}

fn function(tool: &Value) -> Option<Function> {
    let function = tool.get("function")?;
    let name = function.get("name")?.as_str()?.to_owned();
    let parameters = function.get("parameters").and_then(Value::as_object).cloned();
    let strict = function.get("strict").and_then(Value::as_bool).unwrap_or(false);
    Some(Function { name, parameters, strict })
}

/// Reads the output of one choice.
#[derive(Debug)]
pub(crate) struct Reader {
    parser: Parser,
    reading: Reading,
    number: u32,
}

impl Reader {
    /// Whether the model is reasoning.
    pub fn thinks(&self) -> bool {
        self.parser.thinks()
    }

    /// The token with which it may begin to.
    pub fn think_token(&self) -> Option<TokenId> {
        self.reading.think_token
    }

    /// Adds what `text` says.
    pub fn read(&mut self, text: &str, delta: &mut Delta) {
        let output = self.parser.push(text);
        self.add(output, delta);
    }

    /// Adds what was held back.
    pub fn finish(&mut self, delta: &mut Delta) {
        let mut output = self.parser.finish();
        if self.reading.is_wanted {
            // All of it is calls: this is the beginning of one that was cut, and no content.
            output.content.clear();
        }
        self.add(output, delta);
    }

    pub fn reason(&self, reason: FinishReason) -> FinishReason {
        match reason {
            FinishReason::Stop if self.parser.called() && !self.reading.is_named => FinishReason::ToolCalls,
            other => other,
        }
    }

    fn add(&self, output: forebay_calls::Output, delta: &mut Delta) {
        delta.text.push_str(&output.content);
        if self.reading.include_reasoning {
            delta.reasoning.push_str(&output.reasoning);
        }
        for piece in output.calls {
            // As vLLM, only the first counts where one was asked for.
            if piece.index > 0 && !self.reading.parallel {
                continue;
            }
            match delta.tool_calls.last_mut() {
                // SDKs take one piece of a call per frame.
                Some(last) if last.index == piece.index => last.arguments.push_str(&piece.arguments),
                _ => delta.tool_calls.push(ToolCallDelta {
                    index: piece.index,
                    id: piece.name.as_ref().map(|_| self.id(piece.index)),
                    name: piece.name,
                    arguments: piece.arguments,
                }),
            }
        }
    }

    fn id(&self, index: u32) -> String {
        format!("call_{:016x}{:04x}{index:04x}", self.reading.random, self.number)
    }
}
