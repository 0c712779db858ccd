//! A request's method, path and body to an [`Ask`], or an error that names the field.
//!
//! Messages follow OpenAI's wording, as people search for it. A field that nobody here knows is accepted, as it may be
//! meant for an upstream. A field that is known, changes the answer and is not one of [`Generate`](crate::Generate)'s is
//! noted as a [`Need`](crate::Need): an upstream gets it with the body, the engine refuses it, nobody ignores it.
//! Limits on the body's size are the edge's.
//!
//! Where OpenAI and vLLM differ, the wider one counts: up to 16 `stop` strings (OpenAI takes 4), `top_k` and the like.

mod chat;
mod completion;
mod constraint;
mod embed;
mod error;
mod field;
mod sampling;
mod token_api;
mod tokenize;
mod tokens;
mod tools;

use bytes::Bytes;
use forebay_types::ModelName;
use http::Method;
use serde_json::value::to_raw_value;

pub use error::ParseError;

use crate::Ask;
use field::Fields;

/// Bytes that a model's name may have.
const MODEL_BYTES_MAX: usize = 256;

/// What is answered, for the message of a 404.
const ROUTES: &str = "POST /v1/chat/completions, POST /v1/completions, POST /v1/embeddings, \
                      POST /v1/chat/completions/render, POST /v1/completions/render, POST /inference/v1/generate, \
                      POST /tokenize, POST /detokenize, GET /tokenizer_info, \
                      GET /v1/models, GET /v1/models/{model}";

enum Route<'a> {
    Chat,
    Completions,
    Embeddings,
    RenderChat,
    RenderCompletions,
    Tokens,
    Tokenize,
    Detokenize,
    TokenizerInfo,
    Models,
    Model(&'a str),
}

impl<'a> Route<'a> {
    fn find(path: &'a str) -> Option<Self> {
        Some(match path {
            "/v1/chat/completions" => Self::Chat,
            "/v1/completions" => Self::Completions,
            "/v1/embeddings" => Self::Embeddings,
            "/v1/chat/completions/render" => Self::RenderChat,
            "/v1/completions/render" => Self::RenderCompletions,
            "/inference/v1/generate" => Self::Tokens,
            "/tokenize" => Self::Tokenize,
            "/detokenize" => Self::Detokenize,
            "/tokenizer_info" => Self::TokenizerInfo,
            "/v1/models" | "/v1/models/" => Self::Models,
            _ => Self::Model(path.strip_prefix("/v1/models/")?),
        })
    }

    /// The path, with a placeholder for a name in it.
    fn name(&self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Embeddings => "/v1/embeddings",
            Self::RenderChat => "/v1/chat/completions/render",
            Self::RenderCompletions => "/v1/completions/render",
            Self::Tokens => "/inference/v1/generate",
            Self::Tokenize => "/tokenize",
            Self::Detokenize => "/detokenize",
            Self::TokenizerInfo => "/tokenizer_info",
            Self::Models => "/v1/models",
            Self::Model(_) => "/v1/models/{model}",
        }
    }

    fn method(&self) -> Method {
        match self {
            Self::Chat
            | Self::Completions
            | Self::Embeddings
            | Self::RenderChat
            | Self::RenderCompletions
            | Self::Tokens
            | Self::Tokenize
            | Self::Detokenize => Method::POST,
            Self::TokenizerInfo | Self::Models | Self::Model(_) => Method::GET,
        }
    }
}

/// What a path of the LLM API is called, for metrics: one of few names. `None` where there is nothing at it.
pub fn route_name(path: &str) -> Option<&'static str> {
    Route::find(path).map(|route| route.name())
}

/// Understands one request. Pure; any bytes give an `Ask` or an error, never a panic.
///
/// `path` is the path as the LLM API knows it; a query is ignored. A missing `content-type` counts as JSON.
/// `default_model` is meant by a body that names no model, as in vLLM; without it, such a body is refused where it needs one.
pub fn parse(
    method: &Method,
    path: &str,
    content_type: Option<&str>,
    body: &Bytes,
    default_model: Option<&ModelName>,
) -> Result<Ask, ParseError> {
    let path = path.split_once('?').map_or(path, |(path, _)| path);
    // There in vLLM only where it is told to take adapters.
    if matches!(path, "/v1/load_lora_adapter" | "/v1/unload_lora_adapter") {
        return Err(ParseError::NoAdapters);
    }
    let route = Route::find(path).ok_or_else(|| ParseError::RouteNotFound {
        method: method.clone(),
        path: shown(path),
        routes: ROUTES,
    })?;
    let allow = route.method();
    if *method != allow {
        return Err(ParseError::MethodNotAllowed { method: method.clone(), path: shown(path), allow });
    }
    match route {
        Route::TokenizerInfo => return Ok(Ask::TokenizerInfo),
        Route::Models => return Ok(Ask::ListModels),
        Route::Model(id) => {
            let id = percent_decoded(id).filter(|id| id.len() <= MODEL_BYTES_MAX);
            let id = id.ok_or_else(|| ParseError::value("model", "the name in the path is not valid"))?;
            return Ok(Ask::GetModel(ModelName::from(id)));
        }
        Route::Chat
        | Route::Completions
        | Route::Embeddings
        | Route::RenderChat
        | Route::RenderCompletions
        | Route::Tokens
        | Route::Tokenize
        | Route::Detokenize => {}
    }
    if let Some(given) = content_type
        && !is_json(given)
    {
        return Err(ParseError::NotJsonType { given: shown(given) });
    }
    let default_model = default_model.and_then(|model| to_raw_value(model.as_str()).ok());
    let mut fields = Fields::of_body(body)?;
    if let Some(model) = &default_model {
        fields.set_default("model", model);
    }
    match route {
        Route::Chat => chat::parse(&fields, body).map(|call| Ask::Generate(Box::new(call))),
        Route::Completions => completion::parse(&fields, body).map(|call| Ask::Generate(Box::new(call))),
        Route::Embeddings => embed::parse(&fields, body).map(|call| Ask::Embed(call.into())),
        Route::RenderChat => chat::parse(&fields, body).map(|call| Ask::Render(Box::new(call))),
        Route::RenderCompletions => completion::parse(&fields, body).map(|call| Ask::Render(Box::new(call))),
        Route::Tokens => token_api::parse(&fields, body).map(|call| Ask::Generate(Box::new(call))),
        Route::Tokenize => tokenize::parse(&fields, body).map(Ask::Tokenize),
        Route::Detokenize => tokenize::parse_detokenize(&fields, body).map(Ask::Detokenize),
        Route::TokenizerInfo | Route::Models | Route::Model(_) => unreachable!("answered above"),
    }
}

/// Refuses a body that is compressed: its limit is one of bytes as they came, and what they unpack to has none.
pub fn check_encoding(content_encoding: Option<&str>) -> Result<(), ParseError> {
    match content_encoding.map(str::trim) {
        None | Some("") => Ok(()),
        Some(given) if given.eq_ignore_ascii_case("identity") => Ok(()),
        Some(given) => Err(ParseError::Encoded { given: shown(given) }),
    }
}

fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    let essence = essence.to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

/// A client's text for a message: bounded, without control characters.
fn shown(text: &str) -> String {
    const CHARS_MAX: usize = 100;
    let mut out: String = text.chars().take(CHARS_MAX).filter(|c| !c.is_control()).collect();
    if text.chars().nth(CHARS_MAX).is_some() {
        out.push('…');
    }
    out
}

/// `None` where an escape is broken or the bytes are not UTF-8. `+` stays `+`: it is a path, not a form.
fn percent_decoded(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        out.push((digit()? * 16 + digit()?) as u8);
    }
    String::from_utf8(out).ok()
}

fn model(fields: &Fields<'_>) -> Result<Option<ModelName>, ParseError> {
    let Some(name) = fields.string("model")? else { return Ok(None) };
    if name.is_empty() {
        return Err(ParseError::value("model", "empty string. Expected the name of a model"));
    }
    if name.len() > MODEL_BYTES_MAX {
        return Err(ParseError::value("model", format!("longer than {MODEL_BYTES_MAX} bytes")));
    }
    Ok(Some(ModelName::from(name)))
}

fn required_model(fields: &Fields<'_>) -> Result<ModelName, ParseError> {
    model(fields)?.ok_or(ParseError::Missing { param: "model".into() })
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod vllm_tests;
