//! What a client asks for, canonically: one struct whatever the dialect and endpoint.

use std::sync::Arc;

use bytes::Bytes;
use forebay_types::{ModelName, TokenId};
use serde_json::Value;

use crate::Need;

/// The API that a generation was asked through, and so the shape that its reply is rendered in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Api {
    /// `POST /v1/chat/completions`
    ChatCompletions,
    /// `POST /v1/completions`
    Completions,
    /// `POST /inference/v1/generate` (vLLM's): token ids in, token ids out.
    Tokens,
}

/// One request to the LLM stack.
#[derive(Debug, Clone)]
pub enum Ask {
    Generate(Box<Generate>),
    /// `POST /v1/embeddings`
    Embed(Arc<Embed>),
    /// `POST /v1/chat/completions/render` and `POST /v1/completions/render` (vLLM's): what the call would generate from.
    Render(Box<Generate>),
    /// `POST /tokenize` (vLLM's shape)
    Tokenize(Tokenize),
    /// `POST /detokenize` (vLLM's shape)
    Detokenize(Detokenize),
    /// `GET /tokenizer_info` (vLLM's)
    TokenizerInfo,
    /// `GET /v1/models`
    ListModels,
    /// `GET /v1/models/{id}`
    GetModel(ModelName),
}

impl Ask {
    /// The model that is asked for. `None` for a listing, for `/tokenizer_info`, and for `/tokenize` without `model` where there
    /// is no default.
    pub fn model(&self) -> Option<&ModelName> {
        match self {
            Self::Generate(call) | Self::Render(call) => Some(&call.model),
            Self::Embed(call) => Some(&call.model),
            Self::Tokenize(call) => call.model.as_ref(),
            Self::Detokenize(call) => call.model.as_ref(),
            Self::GetModel(model) => Some(model),
            Self::TokenizerInfo | Self::ListModels => None,
        }
    }

    /// What the model has to compute on, with the model's name; `None` for what costs no tokens.
    pub fn prompt(&self) -> Option<(&ModelName, &Prompt)> {
        match self {
            Self::Generate(call) => Some((&call.model, &call.prompt)),
            Self::Embed(call) => Some((&call.model, &call.input)),
            Self::Render(_)
            | Self::Tokenize(_)
            | Self::Detokenize(_)
            | Self::TokenizerInfo
            | Self::ListModels
            | Self::GetModel(_) => None,
        }
    }
}

/// Texts to vectors.
#[derive(Debug, Clone)]
pub struct Embed {
    pub model: ModelName,
    /// Texts or token ids, each of which becomes a vector.
    pub input: Prompt,
    /// OpenAI's `encoding_format`.
    pub format: VectorFormat,
    /// Numbers of each vector; `None` is all.
    pub dimensions: Option<u32>,
    /// vLLM's `use_activation`, before that `normalize`: whether vectors get length 1; `None` is the model's own.
    pub normalize: Option<bool>,
    /// vLLM's `truncate_prompt_tokens`: keep only this many tokens of each text; -1 is the model's limit.
    pub truncate_prompt_tokens: Option<i32>,
    /// vLLM's `add_special_tokens`, `true` unless asked otherwise.
    pub add_special_tokens: bool,
    /// vLLM's `priority`: lower goes first.
    pub priority: i32,
    /// As [`Generate::request_id`].
    pub request_id: Option<String>,
    pub user: Option<String>,
    /// As [`Generate::needs`].
    pub needs: Vec<Need>,
    /// The body as it came, for forwarding in the same dialect.
    pub body: Bytes,
}

/// How vectors are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VectorFormat {
    /// A list of numbers.
    #[default]
    Float,
    /// Little-endian f32 in base64: what OpenAI's own clients ask for.
    Base64,
}

/// One generation: a prompt (or several), `n` choices each.
///
/// Choices are numbered over all prompts, as OpenAI does: choice `p * n + i` is the `i`-th of prompt `p`.
#[derive(Debug, Clone)]
pub struct Generate {
    pub api: Api,
    pub model: ModelName,
    pub prompt: Prompt,
    /// Choices per prompt, at least 1.
    pub n: u32,
    /// New tokens at most, 0 only with `echo`; `None` is the API's default (16 for completions, the rest of the context for chat).
    pub max_tokens: Option<u32>,
    pub min_tokens: u32,
    pub sampling: Sampling,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<TokenId>,
    pub include_stop_str_in_output: bool,
    pub ignore_eos: bool,
    /// `Some(k)`: the chosen token's log-probability and the `k` most likely (0 to 20).
    pub logprobs: Option<u32>,
    /// vLLM's `logprob_token_ids`: with `logprobs`, these tokens' log-probabilities instead of the most likely ones.
    pub logprob_token_ids: Vec<TokenId>,
    /// Completions: repeat the prompt's text before the output. Chat: repeat the last message's, where the assistant
    /// wrote it.
    pub echo: bool,
    pub stream: bool,
    /// `stream_options.include_usage`
    pub include_usage: bool,
    /// vLLM's `stream_options.continuous_usage_stats`: usage so far in every frame. Means nothing without
    /// `include_usage`.
    pub continuous_usage: bool,
    pub user: Option<String>,
    /// Separates prefix caches: equal prompts share KV blocks only under an equal salt.
    pub cache_salt: Option<String>,
    /// vLLM's `priority`: lower goes first.
    pub priority: i32,
    /// What the whole text of each choice has to match; `None` is any text.
    pub constraint: Option<Constraint>,
    /// How the model may call the tools of [`Prompt::Chat`].
    pub tool_choice: ToolChoice,
    /// More than one call in a turn; OpenAI's default is true.
    pub parallel_tool_calls: bool,
    /// vLLM's `include_reasoning`, `true` unless asked otherwise: whether reasoning that was split off is returned.
    pub include_reasoning: bool,
    /// vLLM's `prompt_logprobs`: as `logprobs`, for the tokens of the prompt.
    pub prompt_logprobs: Option<u32>,
    /// vLLM's `bad_words`: texts that are not to be generated, each a word or a phrase.
    pub bad_words: Vec<String>,
    /// vLLM's `return_token_ids`: the ids of prompt and output beside the text.
    pub return_token_ids: bool,
    /// vLLM's `return_tokens_as_token_ids`: log-probabilities name tokens as `token_id:ID`; `None` is the server's default.
    pub tokens_as_ids: Option<bool>,
    /// vLLM's `truncate_prompt_tokens`: keep only this many tokens of the prompt; -1 is as many as fit beside the
    /// output.
    pub truncate_prompt_tokens: Option<i32>,
    /// vLLM's `truncation_side`: what is cut off.
    pub truncation_side: TruncationSide,
    /// vLLM's `add_special_tokens`: put in what the model wants around a text; `None` is the API's default (true for
    /// completions; false for chat, whose template does it).
    pub add_special_tokens: Option<bool>,
    /// vLLM's `continue_final_message`: the answer goes on in the conversation's last message.
    pub continue_final_message: bool,
    /// vLLM's `skip_special_tokens`, `true` unless asked otherwise: control tokens are left out of the text.
    pub skip_special_tokens: bool,
    /// vLLM's `stream_interval`: tokens per frame of a stream, at least 1.
    pub stream_interval: u32,
    /// vLLM's `request_id`: what the reply's `id` is made of, instead of the id that the edge gave.
    pub request_id: Option<String>,
    /// What is asked for beyond all of this, and so what an answer made in this process would lack.
    pub needs: Vec<Need>,
    /// The body as it came, for forwarding in the same dialect with only changed fields spliced.
    pub body: Bytes,
}

/// A language that the output is held to.
#[derive(Debug, Clone, PartialEq)]
pub enum Constraint {
    /// Any JSON object.
    JsonObject,
    /// A JSON value that a JSON schema allows. The schema as it came.
    JsonSchema(Value),
    /// A regular expression that matches the whole text.
    Regex(String),
    /// One of these texts, at least one, none empty.
    Choice(Vec<String>),
    /// A context-free grammar in Lark's notation.
    Grammar(String),
}

/// The end of a prompt that is cut off where it is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TruncationSide {
    /// The last tokens stay.
    #[default]
    Left,
    /// The first tokens stay.
    Right,
}

/// OpenAI's `tool_choice`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ToolChoice {
    /// Text or calls, as the model likes. Means nothing without tools.
    #[default]
    Auto,
    /// Text only, whatever it looks like; the tools are shown to the model all the same, as in vLLM: the prompt's beginning
    /// stays the same from turn to turn.
    None,
    /// At least one call, of any tool.
    Required,
    /// A call of this function.
    Function(String),
}

#[derive(Debug, Clone)]
pub enum Prompt {
    Chat {
        messages: Vec<ChatMessage>,
        /// The `tools` array as it came; templates read it as it is.
        tools: Option<Value>,
        /// vLLM's `add_generation_prompt`, `true` unless asked otherwise.
        add_generation_prompt: bool,
        chat_template_kwargs: Option<serde_json::Map<String, Value>>,
    },
    /// Texts, at least one.
    Text(Vec<String>),
    /// Prompts as token ids, at least one, none empty.
    Tokens(Vec<Vec<TokenId>>),
}

impl Prompt {
    /// How many prompts there are: each is generated for on its own.
    pub fn count(&self) -> usize {
        match self {
            Self::Chat { .. } => 1,
            Self::Text(texts) => texts.len(),
            Self::Tokens(ids) => ids.len(),
        }
    }

    /// Bytes of text, or 4 per token id: what an estimate of the prompt's tokens starts from.
    pub fn text_bytes(&self) -> usize {
        match self {
            Self::Chat { messages, tools, .. } => {
                let tools = tools.as_ref().map_or(0, |t| t.to_string().len());
                tools + messages.iter().map(|m| m.content.text_bytes() + 8).sum::<usize>()
            }
            Self::Text(texts) => texts.iter().map(String::len).sum(),
            Self::Tokens(ids) => ids.iter().map(|ids| ids.len() * 4).sum(),
        }
    }

    /// Bytes of text in the longest prompt: of a conversation, everything that a template could write. 0 for token ids,
    /// which no tokenizer has to work on.
    pub fn bytes_max(&self) -> usize {
        match self {
            Self::Chat { messages, tools, chat_template_kwargs, .. } => {
                conversation_bytes(messages, tools.as_ref(), chat_template_kwargs.as_ref())
            }
            Self::Text(texts) => texts.iter().map(String::len).max().unwrap_or(0),
            Self::Tokens(_) => 0,
        }
    }
}

fn conversation_bytes(
    messages: &[ChatMessage],
    tools: Option<&Value>,
    kwargs: Option<&serde_json::Map<String, Value>>,
) -> usize {
    let extra = |message: &ChatMessage| message.extra.values().map(json_bytes).sum::<usize>();
    let messages = messages.iter().map(|message| message.content.text_bytes() + extra(message));
    let kwargs = kwargs.into_iter().flat_map(|kwargs| kwargs.values());
    messages.sum::<usize>() + tools.into_iter().chain(kwargs).map(json_bytes).sum::<usize>()
}

/// Bytes of the strings and keys in a value, which is not deeper than the parser allows.
fn json_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(json_bytes).sum(),
        Value::Object(fields) => fields.iter().map(|(key, value)| key.len() + json_bytes(value)).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 1,
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct ChatMessage {
    pub role: String,
    pub content: Content,
    /// Everything else of the message (`name`, `tool_calls`, `tool_call_id`, …), as templates want it.
    pub extra: serde_json::Map<String, Value>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// `null` or absent: an assistant message that only calls tools.
    None,
    Text(String),
    /// `[{"type": "text", "text": …}, …]`; only text parts are taken.
    Parts(Vec<String>),
}

impl Content {
    fn text_bytes(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Text(text) => text.len(),
            Self::Parts(parts) => parts.iter().map(String::len).sum(),
        }
    }

    /// The text, parts joined as they are.
    pub fn to_text(&self) -> std::borrow::Cow<'_, str> {
        match self {
            Self::None => "".into(),
            Self::Text(text) => text.into(),
            Self::Parts(parts) => parts.concat().into(),
        }
    }
}

/// How the next token is chosen. Defaults are OpenAI's: temperature 1, everything else off.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// In (0, 1]; 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// In [0, 1]; 0 is off.
    pub min_p: f32,
    /// Same seed, same prompt, same parameters: same output, whatever else is in the batch.
    pub seed: Option<u64>,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// 0 is off; in [-2, 2].
    pub presence_penalty: f32,
    /// 0 is off; in [-2, 2].
    pub frequency_penalty: f32,
    /// Added to the logits before anything else; at most 1024 entries, each in [-100, 100].
    pub logit_bias: Vec<(TokenId, f32)>,
    /// vLLM's `allowed_token_ids`: only these may be chosen; `None` is all.
    pub allowed_token_ids: Option<Vec<TokenId>>,
    /// What of it the request did not say.
    pub left_open: LeftOpen,
}

/// Values of a [`Sampling`] that stand at OpenAI's default because the request has none: a model's own defaults go before
/// these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LeftOpen {
    pub temperature: bool,
    pub top_p: bool,
    pub top_k: bool,
    pub min_p: bool,
    pub repetition_penalty: bool,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: None,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            left_open: LeftOpen::default(),
        }
    }
}

impl Generate {
    /// A call that asks for nothing special: each field is what its absence in a request means.
    pub fn new(api: Api, model: ModelName, prompt: Prompt) -> Self {
        Self {
            api,
            model,
            prompt,
            n: 1,
            max_tokens: None,
            min_tokens: 0,
            sampling: Sampling::default(),
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop_str_in_output: false,
            ignore_eos: false,
            logprobs: None,
            logprob_token_ids: Vec::new(),
            echo: false,
            stream: false,
            include_usage: false,
            continuous_usage: false,
            user: None,
            cache_salt: None,
            priority: 0,
            constraint: None,
            tool_choice: ToolChoice::Auto,
            parallel_tool_calls: true,
            include_reasoning: true,
            prompt_logprobs: None,
            bad_words: Vec::new(),
            return_token_ids: false,
            tokens_as_ids: None,
            truncate_prompt_tokens: None,
            truncation_side: TruncationSide::Left,
            add_special_tokens: None,
            continue_final_message: false,
            skip_special_tokens: true,
            stream_interval: 1,
            request_id: None,
            needs: Vec::new(),
            body: Bytes::new(),
        }
    }
}

#[derive(Debug, Clone)]
pub struct Tokenize {
    pub model: Option<ModelName>,
    pub input: TokenizeInput,
    /// `None` is vLLM's default: true for a prompt, false for messages.
    pub add_special_tokens: Option<bool>,
    pub return_token_strs: bool,
    pub body: Bytes,
}

#[derive(Debug, Clone)]
pub enum TokenizeInput {
    Prompt(String),
    /// As [`Prompt::Chat`].
    Messages {
        messages: Vec<ChatMessage>,
        tools: Option<Value>,
        add_generation_prompt: bool,
        continue_final_message: bool,
        chat_template_kwargs: Option<serde_json::Map<String, Value>>,
    },
}

impl TokenizeInput {
    /// As [`Prompt::bytes_max`].
    pub fn bytes_max(&self) -> usize {
        match self {
            Self::Prompt(prompt) => prompt.len(),
            Self::Messages { messages, tools, chat_template_kwargs, .. } => {
                conversation_bytes(messages, tools.as_ref(), chat_template_kwargs.as_ref())
            }
        }
    }
}

#[derive(Debug, Clone)]
pub struct Detokenize {
    pub model: Option<ModelName>,
    pub tokens: Vec<TokenId>,
    pub body: Bytes,
}
