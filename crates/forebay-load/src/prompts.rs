//! Request bodies: synthetic prompts from a seed, or prompts from a file.

use std::path::Path;

use bytes::Bytes;
use forebay_config::read_limited;
use rand_core::{Rng as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;
use serde_json::{Map, Value, json};

use crate::error::LoadError;
use crate::options::{Endpoint, Options, Prompts};
use crate::words::WORDS;

/// A prompts file at most.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// Words that a tokenizer is asked about: enough that their mean is good to a percent.
pub(crate) const SAMPLE_WORDS: usize = 256;

/// Makes the body of each request. Pure: same options, same index, same bytes.
pub(crate) struct PromptMaker {
    source: Source,
    endpoint: Endpoint,
    /// Everything but the prompt.
    fields: Map<String, Value>,
    extra: Map<String, Value>,
    seed: u64,
}

enum Source {
    Words { prefix: String, words: usize },
    Lines(Vec<Line>),
}

/// A prompt of a file.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    /// A string, or a list of messages.
    prompt: Value,
    max_tokens: Option<u64>,
}

impl PromptMaker {
    /// `tokens_per_word` is the model's, for texts of [`sample_text`].
    pub(crate) fn new(options: &Options, model: &str, tokens_per_word: f64) -> Result<Self, LoadError> {
        let source = match &options.prompts {
            Prompts::Synthetic { prompt_tokens, shared_prefix_tokens } => {
                let words = |tokens: u32| (f64::from(tokens) / tokens_per_word).round() as usize;
                let prefix_words = words(*shared_prefix_tokens);
                let mut rng = rng(options.seed, PREFIX_STREAM);
                let prefix = text(&mut rng, prefix_words);
                let total = words(*prompt_tokens).max(1);
                Source::Words { prefix, words: total.saturating_sub(prefix_words) }
            }
            Prompts::File(path) => Source::Lines(read_lines(path, options.endpoint)?),
        };
        let mut fields = Map::new();
        fields.insert("model".into(), model.into());
        fields.insert("max_tokens".into(), options.output_tokens.into());
        if let Some(temperature) = options.temperature {
            fields.insert("temperature".into(), temperature.into());
        }
        if options.ignore_eos {
            fields.insert("ignore_eos".into(), true.into());
        }
        fields.insert("stream".into(), options.stream.into());
        if options.stream {
            fields.insert("stream_options".into(), json!({"include_usage": true}));
        }
        let extra = options.extra_body.clone();
        Ok(Self { source, endpoint: options.endpoint, fields, extra, seed: options.seed })
    }

    /// The JSON body of request number `index`.
    pub(crate) fn body(&self, index: u64) -> Bytes {
        let mut body = self.fields.clone();
        let prompt = match &self.source {
            Source::Words { prefix, words } => {
                let own = text(&mut rng(self.seed, index), *words);
                let gap = if prefix.is_empty() || own.is_empty() { "" } else { " " };
                Value::String(format!("{prefix}{gap}{own}"))
            }
            Source::Lines(lines) => {
                let line = &lines[(index % lines.len() as u64) as usize];
                if let Some(max_tokens) = line.max_tokens {
                    body.insert("max_tokens".into(), max_tokens.into());
                }
                line.prompt.clone()
            }
        };
        match (self.endpoint, prompt) {
            (Endpoint::Completions, prompt) => body.insert("prompt".into(), prompt),
            (Endpoint::Chat, Value::String(text)) => {
                body.insert("messages".into(), json!([{"role": "user", "content": text}]))
            }
            (Endpoint::Chat, messages) => body.insert("messages".into(), messages),
        };
        body.extend(self.extra.clone());
        Value::Object(body).to_string().into()
    }
}

/// Text like that of the prompts, to ask a tokenizer about.
pub(crate) fn sample_text(seed: u64) -> String {
    text(&mut rng(seed, SAMPLE_STREAM), SAMPLE_WORDS)
}

/// No request has these numbers: warm-up requests count from 2^62, measured ones from 0.
const PREFIX_STREAM: u64 = u64::MAX;
const SAMPLE_STREAM: u64 = u64::MAX - 1;

fn rng(seed: u64, stream: u64) -> Pcg64Mcg {
    Pcg64Mcg::seed_from_u64(mix(seed ^ mix(stream)))
}

/// SplitMix64's finaliser (Steele, Lea and Flood, 2014): neighbouring seeds and indexes land far from each other.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn text(rng: &mut Pcg64Mcg, words: usize) -> String {
    let mut text = String::with_capacity(words * 8);
    for word in 0..words {
        if word > 0 {
            text.push(' ');
        }
        text.push_str(WORDS[rng.next_u32() as usize % WORDS.len()]);
    }
    text
}

fn read_lines(path: &Path, endpoint: Endpoint) -> Result<Vec<Line>, LoadError> {
    let failed = |source| LoadError::PromptsFile { path: path.to_owned(), source };
    let content = read_limited(path, FILE_BYTES_MAX).map_err(failed)?;
    let content =
        String::from_utf8(content).map_err(|error| failed(std::io::Error::other(error.utf8_error())))?;
    let mut lines = Vec::new();
    for (index, line) in content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line = parse_line(line, endpoint).map_err(|why| LoadError::PromptLine {
            path: path.to_owned(),
            line: index + 1,
            why,
        })?;
        lines.push(line);
    }
    if lines.is_empty() {
        return Err(LoadError::NoPrompts { path: path.to_owned() });
    }
    Ok(lines)
}

fn parse_line(line: &str, endpoint: Endpoint) -> Result<Line, &'static str> {
    let mut object = match serde_json::from_str(line).map_err(|_| "it is not JSON")? {
        Value::String(text) => return Ok(Line { prompt: Value::String(text), max_tokens: None }),
        Value::Object(object) => object,
        _ => return Err("it is neither a string nor an object"),
    };
    let max_tokens = match object.remove("max_tokens") {
        None | Some(Value::Null) => None,
        Some(value) => match value.as_u64() {
            Some(tokens) if tokens > 0 => Some(tokens),
            _ => return Err("`max_tokens` is not a positive number"),
        },
    };
    let prompt = match (object.remove("prompt"), object.remove("messages"), endpoint) {
        (Some(prompt @ Value::String(_)), None, _) => prompt,
        (None, Some(messages @ Value::Array(_)), Endpoint::Chat) => messages,
        (None, Some(_), Endpoint::Completions) => return Err("`messages` are for the chat endpoint"),
        _ => return Err("it needs either `prompt`, a string, or `messages`, a list"),
    };
    Ok(Line { prompt, max_tokens })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn maker(change: impl FnOnce(&mut Options)) -> PromptMaker {
        let mut options = Options::default();
        change(&mut options);
        PromptMaker::new(&options, "m", 1.0).expect("the options are good")
    }

    fn synthetic(prompt_tokens: u32, shared_prefix_tokens: u32) -> Prompts {
        Prompts::Synthetic { prompt_tokens, shared_prefix_tokens }
    }

    fn content(maker: &PromptMaker, index: u64) -> String {
        let body: Value = serde_json::from_slice(&maker.body(index)).expect("JSON");
        body["messages"][0]["content"].as_str().expect("text").to_owned()
    }

    #[test]
    fn bodies() {
        let check = |change: fn(&mut Options), expect: Value| {
            let body: Value = serde_json::from_slice(&maker(change).body(0)).expect("JSON");
            for (key, value) in expect.as_object().expect("an object") {
                assert_eq!(body.get(key), (!value.is_null()).then_some(value), "{key} in {body}");
            }
        };
        check(
            |_| {},
            json!({"model": "m", "max_tokens": 64, "temperature": 0.0, "stream": true, "prompt": null,
                   "stream_options": {"include_usage": true}, "ignore_eos": null}),
        );
        check(|o| o.stream = false, json!({"stream": false, "stream_options": null}));
        check(|o| o.ignore_eos = true, json!({"ignore_eos": true}));
        check(|o| o.temperature = None, json!({"temperature": null}));
        let extra = |o: &mut Options| {
            o.extra_body = json!({"max_tokens": 1, "x": [1]}).as_object().cloned().unwrap_or_default();
        };
        check(extra, json!({"max_tokens": 1, "x": [1]}));
        let completions = maker(|o| o.endpoint = Endpoint::Completions).body(0);
        let completions: Value = serde_json::from_slice(&completions).expect("JSON");
        assert!(completions["prompt"].is_string() && completions.get("messages").is_none());
    }

    #[test]
    fn prompts_are_as_long_as_asked_and_come_from_the_seed() {
        let one = maker(|o| o.prompts = synthetic(50, 0));
        assert_eq!(content(&one, 3).split(' ').count(), 50);
        assert_eq!(content(&one, 3), content(&maker(|o| o.prompts = synthetic(50, 0)), 3));
        let other = maker(|o| (o.prompts, o.seed) = (synthetic(50, 0), 1));
        assert_ne!(content(&one, 3), content(&other, 3));
        let options = Options { prompts: synthetic(300, 100), ..Options::default() };
        let longer = PromptMaker::new(&options, "m", 1.5).expect("the options are good");
        assert_eq!(content(&longer, 0).split(' ').count(), 200);
    }

    /// The first block of a prefix cache has 16 tokens or more: no two prompts may share it.
    #[test]
    fn no_two_prompts_begin_alike() {
        let maker = maker(|o| o.prompts = synthetic(16, 0));
        let seen: HashSet<String> =
            (0..5000).chain((1 << 62)..(1 << 62) + 100).map(|i| content(&maker, i)).collect();
        assert_eq!(seen.len(), 5100);
    }

    #[test]
    fn a_shared_prefix_is_shared_and_the_rest_is_not() {
        let maker = maker(|o| o.prompts = synthetic(64, 32));
        let texts: Vec<Vec<String>> =
            (0..20).map(|i| content(&maker, i).split(' ').map(str::to_owned).collect()).collect();
        assert!(texts.iter().all(|t| t.len() == 64 && t[..32] == texts[0][..32]));
        assert_eq!(texts.iter().map(|t| &t[32..48]).collect::<HashSet<_>>().len(), 20);
        let whole = self::maker(|o| o.prompts = synthetic(32, 32));
        assert_eq!(content(&whole, 0), content(&whole, 1));
    }

    #[test]
    fn lines_of_a_file() {
        let check = |line: &str, endpoint, expect: Result<Value, &str>| {
            let found = parse_line(line, endpoint).map(|line| line.prompt);
            assert_eq!(found, expect, "{line}");
        };
        let messages = json!([{"role": "user", "content": "hi"}]);
        check(r#""hi""#, Endpoint::Chat, Ok("hi".into()));
        check(r#"{"prompt":"hi","id":7}"#, Endpoint::Completions, Ok("hi".into()));
        check(&json!({"messages": messages}).to_string(), Endpoint::Chat, Ok(messages.clone()));
        let wrong_endpoint = Err("`messages` are for the chat endpoint");
        check(&json!({"messages": messages}).to_string(), Endpoint::Completions, wrong_endpoint);
        check("hi", Endpoint::Chat, Err("it is not JSON"));
        check("7", Endpoint::Chat, Err("it is neither a string nor an object"));
        let neither = Err("it needs either `prompt`, a string, or `messages`, a list");
        check("{}", Endpoint::Chat, neither.clone());
        check(r#"{"prompt":"a","messages":[]}"#, Endpoint::Chat, neither);
        check(
            r#"{"prompt":"a","max_tokens":0}"#,
            Endpoint::Chat,
            Err("`max_tokens` is not a positive number"),
        );
        let line = parse_line(r#"{"prompt":"a","max_tokens":5}"#, Endpoint::Chat).expect("a prompt");
        assert_eq!(line.max_tokens, Some(5));
    }
}
