//! Replies of `/tokenize` and `/detokenize`, in vLLM's shape.

use bytes::Bytes;
use forebay_types::TokenId;
use serde::Serialize;

#[derive(Serialize)]
struct Tokenized<'a> {
    count: usize,
    max_model_len: u32,
    tokens: &'a [TokenId],
    token_strs: Option<&'a [String]>,
}

#[derive(Serialize)]
struct Detokenized<'a> {
    prompt: &'a str,
}

/// `token_strs` are the tokens' texts, one per token, where the client asked for them.
pub fn render_tokenized(tokens: &[TokenId], max_model_len: u32, token_strs: Option<&[String]>) -> Bytes {
    let body = Tokenized { count: tokens.len(), max_model_len, tokens, token_strs };
    serde_json::to_vec(&body).expect("strings and numbers serialize").into()
}

pub fn render_detokenized(prompt: &str) -> Bytes {
    serde_json::to_vec(&Detokenized { prompt }).expect("a string serializes").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vllm_shapes() {
        assert_eq!(
            render_tokenized(&[1, 2], 8, None),
            r#"{"count":2,"max_model_len":8,"tokens":[1,2],"token_strs":null}"#
        );
        let strs = ["a".to_owned()];
        assert_eq!(
            render_tokenized(&[1], 8, Some(&strs)),
            r#"{"count":1,"max_model_len":8,"tokens":[1],"token_strs":["a"]}"#
        );
        assert_eq!(render_detokenized("a\"b"), r#"{"prompt":"a\"b"}"#);
    }
}
