//! Chat templates: the Jinja template that came with a model turns messages into the text of a prompt.
//!
//! The environment is the one of Hugging Face's `apply_chat_template` (`trim_blocks`, `lstrip_blocks`, loop controls,
//! `tojson` as `json.dumps`, `raise_exception`, `strftime_now`), and messages are prepared as vLLM does: missing
//! content becomes empty text, text parts are joined with a newline unless the template takes parts itself, and
//! `arguments` of tool calls become an object. Where the template knows nothing of tools, they are written into the
//! messages (`tools.rs`).
//!
//! Templates come with the model and are run under limits all the same: fuel, recursion, size of the output.

use std::borrow::Cow;
use std::io;

use forebay_types::{Blame, Class, Classify, Code};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value};
use serde_json::{Map, Value as Json};

use crate::guard::Guard;
use crate::tokenizer::TEXT_BYTES_MAX;

mod messages;
mod python;
mod time;
mod tools;

pub use time::CivilTime;

/// What models without a template of their own get: ChatML.
const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] \
                      + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' \
                      }}{% endif %}";

/// One unit is an instruction or 64 bytes of text made. A message takes 20 to 100, and 16 million take about a
/// second, so this ends a template that runs away and nothing else.
const FUEL: u64 = 16_000_000;
const RECURSION_MAX: usize = 100;
const NAME: &str = "chat_template";
/// A text that no template has of its own.
const MARK: &str = "9f2d1c";

/// Names that a template gets from us; `chat_template_kwargs` of a request can't replace them.
const RESERVED: &[&str] = &[
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "raise_exception",
    "strftime_now",
];

/// Why a prompt could not be made of messages.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The model's template itself is wrong. Happens when a model is loaded.
    #[error("the chat template does not compile: {reason}")]
    Syntax { reason: String },
    /// The template calls `raise_exception`: these messages are not for this model.
    #[error("the model's chat template refuses these messages: {reason}")]
    Refused { reason: String },
    /// Any other failure in the template, nearly always a field that it expects and the messages lack.
    #[error("the model's chat template failed on these messages: {reason}")]
    Failed { reason: String },
    #[error("the model's chat template took more than {FUEL} steps on these messages")]
    TooMuchWork,
    #[error("the prompt is longer than {TEXT_BYTES_MAX} bytes")]
    TooLong,
    #[error("message {index} is not an object with a `role`")]
    NotAMessage { index: usize },
    #[error("message {index} has the role `{role}`; a role is a word of a-z, 0-9, `_` and `-`")]
    BadRole { index: usize, role: String },
    #[error("`chat_template_kwargs` must not set `{name}`")]
    ReservedName { name: String },
    #[error("`continue_final_message` needs a last message whose text the template writes out")]
    CannotContinue,
    #[error("`continue_final_message` and `add_generation_prompt` exclude each other")]
    ContinueAndGenerate,
}

impl Classify for TemplateError {
    fn class(&self) -> Class {
        match self {
            Self::Syntax { .. } => Class::new(Code::Internal, Blame::Us),
            Self::Refused { .. }
            | Self::Failed { .. }
            | Self::TooMuchWork
            | Self::NotAMessage { .. }
            | Self::BadRole { .. }
            | Self::ReservedName { .. }
            | Self::CannotContinue
            | Self::ContinueAndGenerate => Class::new(Code::BadRequest, Blame::Client),
            Self::TooLong => Class::new(Code::ContextLengthExceeded, Blame::Client),
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::Syntax { .. } => None,
            Self::Refused { .. }
            | Self::Failed { .. }
            | Self::TooMuchWork
            | Self::TooLong
            | Self::NotAMessage { .. }
            | Self::BadRole { .. } => Some("messages"),
            Self::ReservedName { .. } => Some("chat_template_kwargs"),
            Self::CannotContinue | Self::ContinueAndGenerate => Some("continue_final_message"),
        }
    }
}

/// What a prompt is made of.
#[derive(Debug, Clone)]
pub struct ChatPrompt<'a> {
    /// Messages as in the OpenAI API: `role`, `content` (text, parts or null), `tool_calls`, `name`, ...
    pub messages: &'a [Json],
    /// Tools as in the OpenAI API; `None` and empty are the same.
    pub tools: Option<&'a [Json]>,
    pub documents: Option<&'a [Json]>,
    /// End with the beginning of an answer.
    pub add_generation_prompt: bool,
    /// End in the middle of the last message, so that the model continues it.
    pub continue_final_message: bool,
    /// Further variables (`enable_thinking`).
    pub kwargs: Option<&'a Map<String, Json>>,
    /// What `strftime_now` prints. A template without a date gives the same prompt at any time.
    pub now: CivilTime,
}

impl<'a> ChatPrompt<'a> {
    /// Messages to be answered, nothing else.
    pub fn new(messages: &'a [Json]) -> Self {
        Self {
            messages,
            tools: None,
            documents: None,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: None,
            now: CivilTime::EPOCH,
        }
    }
}

/// Texts of special tokens, as the template may name them; absent ones are undefined in it.
#[derive(Debug, Clone, Default)]
pub(crate) struct TokenTexts {
    pub(crate) bos: Option<String>,
    pub(crate) eos: Option<String>,
    pub(crate) unk: Option<String>,
    pub(crate) pad: Option<String>,
}

/// How a template wants `content`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ContentFormat {
    Text,
    /// A list of `{"type": "text", "text": ...}`; `text_too` if a plain string does as well.
    Parts {
        text_too: bool,
    },
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    content: ContentFormat,
    /// Tools reach the prompt.
    shows_tools: bool,
    /// A system message does.
    shows_system: bool,
    tokens: TokenTexts,
}

impl ChatTemplate {
    /// Compiles the template of a model; ChatML where it has none.
    pub fn new(source: Option<&str>) -> Result<Self, TemplateError> {
        Self::with_tokens(source, TokenTexts::default())
    }

    pub(crate) fn with_tokens(source: Option<&str>, tokens: TokenTexts) -> Result<Self, TemplateError> {
        let source = source.unwrap_or(CHATML).to_owned();
        let mut env = Environment::new();
        env.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .expect("the default delimiters are valid"),
        );
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.set_recursion_limit(RECURSION_MAX);
        env.set_fuel(Some(FUEL));
        env.add_filter("tojson", python::tojson);
        env.add_function("raise_exception", raise_exception);
        env.add_template_owned(NAME, python::without_generation_tags(&source))
            .map_err(|error| TemplateError::Syntax { reason: describe(&error) })?;
        let content = ContentFormat::Text;
        let mut template = Self { env, source, content, shows_tools: false, shows_system: false, tokens };
        template.content = template.probe();
        template.shows_tools = template.probe_tools();
        template.shows_system = template.probe_system();
        Ok(template)
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template itself writes tools into the prompt. Where it doesn't, they are shown to the model in the form
    /// of Hermes.
    pub fn shows_tools(&self) -> bool {
        self.shows_tools
    }

    /// The prompt as text, exactly as Hugging Face's `apply_chat_template(tokenize=False)`, but that a template without
    /// tools is given messages that have them in words. Text of clients in it is not told apart: to get ids, use [`TextModel::encode_chat`](crate::TextModel::encode_chat).
    ///
    /// Pure. O(text) for templates that are.
    pub fn render(&self, prompt: &ChatPrompt<'_>) -> Result<String, TemplateError> {
        self.render_guarded(prompt, None)
    }

    /// As [`render`](Self::render), with client text protected by `guard`.
    pub(crate) fn render_guarded(
        &self,
        prompt: &ChatPrompt<'_>,
        guard: Option<&Guard>,
    ) -> Result<String, TemplateError> {
        if prompt.continue_final_message && prompt.add_generation_prompt {
            return Err(TemplateError::ContinueAndGenerate);
        }
        let client = messages::Client { guard, content: self.content };
        let tools = prompt.tools.unwrap_or_default();
        let in_words = match self.shows_tools {
            true => None,
            false => tools::written_out(prompt.messages, tools, self.shows_system),
        };
        let messages = client.messages(in_words.as_deref().unwrap_or(prompt.messages))?;
        let list = |list: Option<&[Json]>| match list {
            Some(list) if !list.is_empty() => list.iter().map(|item| client.value(item)).collect(),
            _ => Value::from(()),
        };
        let mut variables: Vec<(String, Value)> = Vec::new();
        for (name, value) in prompt.kwargs.into_iter().flatten() {
            if RESERVED.contains(&name.as_str()) {
                return Err(TemplateError::ReservedName { name: name.clone() });
            }
            variables.push((name.clone(), client.value(value)));
        }
        let last = messages.last().cloned();
        variables.push(("messages".to_owned(), Value::from(messages)));
        variables.push(("tools".to_owned(), list(prompt.tools)));
        variables.push(("documents".to_owned(), list(prompt.documents)));
        variables.push(("add_generation_prompt".to_owned(), Value::from(prompt.add_generation_prompt)));
        let now = prompt.now;
        variables.push((
            "strftime_now".to_owned(),
            Value::from_function(move |format: Cow<'_, str>| now.format(&format)),
        ));
        let rendered = self.run(variables)?;
        if prompt.continue_final_message { cut_after_last(rendered, last.as_ref()) } else { Ok(rendered) }
    }

    fn run(&self, mut variables: Vec<(String, Value)>) -> Result<String, TemplateError> {
        let tokens = &self.tokens;
        for (name, text) in [
            ("bos_token", &tokens.bos),
            ("eos_token", &tokens.eos),
            ("unk_token", &tokens.unk),
            ("pad_token", &tokens.pad),
        ] {
            if let Some(text) = text {
                variables.push((name.to_owned(), Value::from(text.as_str())));
            }
        }
        let template = self
            .env
            .get_template(NAME)
            .map_err(|error| TemplateError::Syntax { reason: describe(&error) })?;
        let mut out = Bounded { bytes: Vec::new(), full: false };
        match template.render_captured_to(Value::from_pairs(variables), &mut out) {
            Ok(_) => Ok(String::from_utf8(out.bytes).expect("templates write strings")),
            Err(_) if out.full => Err(TemplateError::TooLong),
            Err(error) if error.kind() == ErrorKind::OutOfFuel => Err(TemplateError::TooMuchWork),
            Err(error) => Err(match refusal(&error) {
                Some(reason) => TemplateError::Refused { reason },
                None => TemplateError::Failed { reason: describe(&error) },
            }),
        }
    }

    /// Finds out how the template wants content, by rendering one message both ways. vLLM looks for a loop over
    /// `content` in the syntax tree; the outcome is what counts.
    fn probe(&self) -> ContentFormat {
        let renders = |content: Json| {
            let messages = [serde_json::json!({"role": "user", "content": content})];
            // The text, but not a list written out.
            self.rendered(&messages, None).is_some_and(|text| text.contains(MARK) && !text.contains("type"))
        };
        let text_too = renders(Json::from(MARK));
        if renders(serde_json::json!([{"type": "text", "text": MARK}])) {
            ContentFormat::Parts { text_too }
        } else {
            ContentFormat::Text
        }
    }

    fn probe_tools(&self) -> bool {
        let parameters = serde_json::json!({"type": "object", "properties": {}});
        let function = serde_json::json!({"name": MARK, "description": "", "parameters": parameters});
        let tool = serde_json::json!({"type": "function", "function": function});
        let messages = [serde_json::json!({"role": "user", "content": self.probed("x")})];
        self.rendered(&messages, Some(&tool)).is_some_and(|text| text.contains(MARK))
    }

    fn probe_system(&self) -> bool {
        let message = |role, text| serde_json::json!({"role": role, "content": self.probed(text)});
        let messages = [message("system", MARK), message("user", "x")];
        self.rendered(&messages, None).is_some_and(|text| text.contains(MARK))
    }

    /// A text as the template wants contents.
    fn probed(&self, text: &str) -> Json {
        match self.content {
            ContentFormat::Parts { text_too: false } => serde_json::json!([{"type": "text", "text": text}]),
            _ => text.into(),
        }
    }

    /// What the template makes of these messages as they are.
    fn rendered(&self, messages: &[Json], tool: Option<&Json>) -> Option<String> {
        let client = messages::Client { guard: None, content: ContentFormat::Parts { text_too: true } };
        let list = |items: &[Json]| items.iter().map(|item| client.value(item)).collect::<Value>();
        let variables = vec![
            ("messages".to_owned(), list(messages)),
            ("tools".to_owned(), tool.map_or(Value::from(()), |tool| list(std::slice::from_ref(tool)))),
            ("documents".to_owned(), Value::from(())),
            ("add_generation_prompt".to_owned(), Value::from(false)),
            ("strftime_now".to_owned(), Value::from_function(|_: Cow<'_, str>| String::new())),
        ];
        self.run(variables).ok()
    }
}

/// Cuts a prompt after the text of its last message, as Hugging Face's `continue_final_message`.
fn cut_after_last(mut rendered: String, last: Option<&Value>) -> Result<String, TemplateError> {
    let content = last.and_then(|message| message.get_attr("content").ok());
    let content = match &content {
        Some(content) if content.as_str().is_none() => content
            .try_iter()
            .ok()
            .and_then(|parts| parts.filter_map(|part| part.get_attr("text").ok()).last()),
        other => other.clone(),
    };
    let text = content.as_ref().and_then(Value::as_str).ok_or(TemplateError::CannotContinue)?;
    let (trimmed, without_start) = (text.trim(), text.trim_start());
    let at = rendered.rfind(trimmed).ok_or(TemplateError::CannotContinue)?;
    // A template that keeps trailing spaces keeps them here too.
    let keep = if rendered[at..].starts_with(without_start) { without_start } else { trimmed };
    rendered.truncate(at + keep.len());
    Ok(rendered)
}

/// The source of the error that `raise_exception` makes, by which it is known from all others.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn raise_exception(message: Cow<'_, str>) -> Result<Value, minijinja::Error> {
    let refusal = Refusal(message.into_owned());
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(refusal))
}

fn refusal(error: &minijinja::Error) -> Option<String> {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(refusal) = error.downcast_ref::<Refusal>() {
            return Some(refusal.0.clone());
        }
        source = error.source();
    }
    None
}

/// What went wrong and in which line, without the template's text.
fn describe(error: &minijinja::Error) -> String {
    let what = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    match error.line() {
        Some(line) => format!("{what} (line {line} of the template)"),
        None => what,
    }
}

/// A sink that stops a template which writes too much.
struct Bounded {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + buf.len() > TEXT_BYTES_MAX {
            self.full = true;
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        self.bytes.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
