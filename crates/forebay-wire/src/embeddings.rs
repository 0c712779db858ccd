//! The reply of `/v1/embeddings`: OpenAI's shape with vLLM's `id` and `created`.

use bytes::{BufMut, Bytes, BytesMut};
use forebay_types::{ModelName, Usage};

use crate::VectorFormat;
use crate::json::{put, put_raw};

/// What is the same for all vectors of a reply.
#[derive(Debug, Clone)]
pub struct EmbeddingsHead<'a> {
    /// The request's id, without a prefix.
    pub id: &'a str,
    pub created_unix: u64,
    /// The name that the client used.
    pub model: &'a ModelName,
    pub format: VectorFormat,
}

/// The body: `vectors` in the order of the inputs. A value that is no number (JSON has none) is written as 0 in a list
/// of numbers, and as it is in base64.
pub fn render_embeddings(head: &EmbeddingsHead<'_>, vectors: &[Vec<f32>], usage: &Usage) -> Bytes {
    let values: usize = vectors.iter().map(Vec::len).sum();
    // A number takes about 12 characters, four bytes in base64 six.
    let mut out = BytesMut::with_capacity(256 + vectors.len() * 64 + values * 12);
    put_raw(&mut out, "{\"id\":");
    put(&mut out, &format!("embd-{}", head.id));
    put_raw(&mut out, ",\"object\":\"list\",\"created\":");
    put(&mut out, &head.created_unix);
    put_raw(&mut out, ",\"model\":");
    put(&mut out, head.model.as_str());
    put_raw(&mut out, ",\"data\":[");
    for (index, vector) in vectors.iter().enumerate() {
        put_raw(&mut out, if index > 0 { ",{\"index\":" } else { "{\"index\":" });
        put(&mut out, &index);
        put_raw(&mut out, ",\"object\":\"embedding\",\"embedding\":");
        match head.format {
            VectorFormat::Float => put_numbers(&mut out, vector),
            VectorFormat::Base64 => put_base64(&mut out, vector),
        }
        put_raw(&mut out, "}");
    }
    put_raw(&mut out, "],\"usage\":{\"prompt_tokens\":");
    put(&mut out, &usage.prompt_tokens);
    put_raw(&mut out, ",\"total_tokens\":");
    put(&mut out, &usage.total());
    put_raw(&mut out, ",\"completion_tokens\":0,\"prompt_tokens_details\":null}}");
    out.freeze()
}

fn put_numbers(out: &mut BytesMut, vector: &[f32]) {
    for (i, &value) in vector.iter().enumerate() {
        put_raw(out, if i > 0 { "," } else { "[" });
        put(out, if value.is_finite() { &value } else { &0.0 });
    }
    put_raw(out, if vector.is_empty() { "[]" } else { "]" });
}

/// The little-endian bytes in base64 (RFC 4648, section 4), in quotes.
fn put_base64(out: &mut BytesMut, vector: &[f32]) {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
    out.put_u8(b'"');
    for group in bytes.chunks(3) {
        let at = |i: usize| u32::from(group.get(i).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for i in 0..4 {
            let digit = ALPHABET[(bits >> (18 - 6 * i) & 63) as usize];
            out.put_u8(if i <= group.len() { digit } else { b'=' });
        }
    }
    out.put_u8(b'"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(format: VectorFormat, vectors: &[Vec<f32>]) -> String {
        let model = ModelName::from("m\"");
        let head = EmbeddingsHead { id: "r1", created_unix: 7, model: &model, format };
        let usage = Usage { prompt_tokens: 5, completion_tokens: 0, ..Usage::default() };
        String::from_utf8(render_embeddings(&head, vectors, &usage).into()).unwrap()
    }

    #[test]
    fn vllms_shape() {
        assert_eq!(
            render(VectorFormat::Float, &[vec![0.5, -1e-7], vec![f32::NAN, 2.0]]),
            r#"{"id":"embd-r1","object":"list","created":7,"model":"m\"","data":[{"index":0,"object":"embedding","embedding":[0.5,-1e-7]},{"index":1,"object":"embedding","embedding":[0.0,2.0]}],"usage":{"prompt_tokens":5,"total_tokens":5,"completion_tokens":0,"prompt_tokens_details":null}}"#
        );
        serde_json::from_str::<serde_json::Value>(&render(VectorFormat::Float, &[vec![], vec![1.0]]))
            .unwrap();
    }

    /// Expected texts by Python's `base64.b64encode(struct.pack('<…f', …))`.
    #[test]
    fn base64_of_every_length_modulo_three() {
        let check = |vector: &[f32], expect: &str| {
            let body = render(VectorFormat::Base64, &[vector.to_vec()]);
            assert!(body.contains(&format!("\"embedding\":\"{expect}\"}}")), "{body}");
        };
        check(&[], "");
        check(&[1.0], "AACAPw==");
        check(&[1.0, -2.5], "AACAPwAAIMA=");
        check(&[1.0, -2.5, 3.25e-5], "AACAPwAAIMCcUAg4");
    }
}
