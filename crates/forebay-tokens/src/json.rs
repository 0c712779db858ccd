//! A tokenizer from Hugging Face's `tokenizer.json`, with the roles of its tokens from `tokenizer_config.json`.
//!
//! Takes the file's normalizer, pre-tokenizer, model, added tokens and post-processor; leaves its truncation and
//! padding alone, which are for training. Decoding covers the decoders of byte-level BPE, of SentencePiece and of
//! WordPiece, where each token has bytes of its own; WordPiece's clean-up of spaces before punctuation is not done.

use forebay_types::TokenId;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokenizers::{
    DecoderWrapper, Encoding, ModelWrapper, NormalizerWrapper, PostProcessor, PostProcessorWrapper, Token,
};

use crate::added::{AddedToken, AddedTokens};
use crate::alphabet;
use crate::pre;
use crate::tokenizer::{Entries, LibraryPipeline, Parts, Pipeline, Roles, Tokenizer, TokenizerId};
use crate::vocab::{BuildError, TOKENS_MAX, TokenType, own_bpe};
use crate::words::Cut;

/// `tokenizer_config.json`: only what names a token or holds a template.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct TokenizerConfig {
    pub(crate) bos_token: Option<TokenName>,
    pub(crate) eos_token: Option<TokenName>,
    pub(crate) unk_token: Option<TokenName>,
    pub(crate) pad_token: Option<TokenName>,
    pub(crate) chat_template: Option<TemplateText>,
}

impl TokenizerConfig {
    /// Both files are optional; what the first lacks is taken from the second.
    pub(crate) fn read(config: Option<&[u8]>, special_tokens: Option<&[u8]>) -> Result<Self, BuildError> {
        let read = |file, json: Option<&[u8]>| json.map_or(Ok(Self::default()), |json| parse(file, json));
        let first = read("tokenizer_config.json", config)?;
        let second = read("special_tokens_map.json", special_tokens)?;
        Ok(Self {
            bos_token: first.bos_token.or(second.bos_token),
            eos_token: first.eos_token.or(second.eos_token),
            unk_token: first.unk_token.or(second.unk_token),
            pad_token: first.pad_token.or(second.pad_token),
            chat_template: first.chat_template,
        })
    }
}

/// A token by its text, or as the serialised `AddedToken` of older files.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum TokenName {
    Text(String),
    Token { content: String },
}

impl TokenName {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Token { content: text } => text,
        }
    }
}

/// One template, or several by name of which `default` is the one for chat.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum TemplateText {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
pub(crate) struct NamedTemplate {
    pub(crate) name: String,
    pub(crate) template: String,
}

/// `generation_config.json`: the tokens that end a generation.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct GenerationConfig {
    #[serde(default)]
    pub(crate) eos_token_id: Option<OneOrMany>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany {
    One(TokenId),
    Many(Vec<TokenId>),
}

pub(crate) fn parse<'a, T: Deserialize<'a>>(file: &'static str, json: &'a [u8]) -> Result<T, BuildError> {
    serde_json::from_slice(json).map_err(|source| BuildError::Json { file, source })
}

impl Tokenizer {
    /// From the bytes of `tokenizer.json` and, where there are, of `tokenizer_config.json` and
    /// `generation_config.json`. Without these no token has a role, and only well-known names end a generation.
    pub fn from_json(
        tokenizer: &[u8],
        config: Option<&[u8]>,
        generation: Option<&[u8]>,
    ) -> Result<Self, BuildError> {
        Self::with_config(tokenizer, &TokenizerConfig::read(config, None)?, generation)
    }

    pub(crate) fn with_config(
        tokenizer: &[u8],
        config: &TokenizerConfig,
        generation: Option<&[u8]>,
    ) -> Result<Self, BuildError> {
        let generation: GenerationConfig = generation
            .map_or(Ok(GenerationConfig::default()), |json| parse("generation_config.json", json))?;
        let hf = by_library(|| tokenizers::Tokenizer::from_bytes(tokenizer))?;

        let spelling =
            hf.get_decoder().map(Spelling::of).transpose()?.unwrap_or(Spelling::Plain { strip: false });
        let (entries, controls, user_defined) = read_tokens(&hf, &spelling)?;
        let spec: Spec = parse("tokenizer.json", tokenizer)?;
        let unk = spec.model.unk_id.or_else(|| hf.token_to_id(spec.model.unk_token.as_deref()?));
        let pipeline = match by_hand(spec, &hf, &entries) {
            Some(pipeline) => pipeline,
            None => Pipeline::Library(Box::new(LibraryPipeline {
                normalizer: hf.get_normalizer().cloned(),
                pre_tokenizer: hf.get_pre_tokenizer().cloned(),
                model: hf.get_model().clone(),
                never: controls.iter().map(|token| token.id).filter(|id| Some(*id) != unk).collect(),
            })),
        };
        let (prefix, suffix) =
            hf.get_post_processor().map(|it| by_library(|| around(it))).transpose()?.unwrap_or_default();
        let id_of = |name: &Option<TokenName>| name.as_ref().and_then(|name| hf.token_to_id(name.text()));
        let roles = Roles {
            bos: id_of(&config.bos_token),
            eos: id_of(&config.eos_token),
            eot: None,
            unk: id_of(&config.unk_token).or(unk),
            pad: id_of(&config.pad_token),
            eog: match generation.eos_token_id {
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
                None => Vec::new(),
            },
        };
        Self::from_parts(Parts {
            id: identity(tokenizer),
            pipeline,
            controls: AddedTokens::new(controls)?,
            user_defined: AddedTokens::new(user_defined)?,
            prefix,
            suffix,
            entries,
            roles,
            strip_first_space: spelling.strips_first_space(),
        })
    }
}

/// The library panics on some broken files (one that ends within its decoder, for one), and a model that can't be
/// loaded is an error like any other.
fn by_library<T>(read: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, BuildError> {
    // Nothing that `read` was changing is used after a panic: it only makes its result.
    let read = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read));
    let read = read.unwrap_or_else(|_| Err("the library panicked".into()));
    read.map_err(BuildError::Library)
}

fn identity(tokenizer: &[u8]) -> TokenizerId {
    let mut hash = Sha256::new();
    hash.update("forebay tokenizer from tokenizer.json, 1");
    hash.update(tokenizer);
    TokenizerId(hash.finalize().into())
}

/// The parts of `tokenizer.json` that decide whether our own pipeline gives the same ids.
#[derive(Deserialize)]
struct Spec {
    pre_tokenizer: Option<PreSpec>,
    model: ModelSpec,
}

#[derive(Deserialize)]
struct ModelSpec {
    #[serde(default)]
    merges: Vec<MergeSpec>,
    /// By text (BPE, WordPiece, WordLevel), or by id (Unigram).
    unk_token: Option<String>,
    unk_id: Option<TokenId>,
}

/// `a b`, or since 2024 `["a", "b"]`.
#[derive(Deserialize)]
#[serde(untagged)]
enum MergeSpec {
    Text(String),
    Pair(String, String),
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PreSpec {
    ByteLevel {
        add_prefix_space: bool,
        #[serde(default = "yes")]
        use_regex: bool,
    },
    Digits {
        individual_digits: bool,
    },
    Split {
        pattern: PatternSpec,
        behavior: String,
        invert: bool,
    },
    Sequence {
        pretokenizers: Vec<PreSpec>,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
enum PatternSpec {
    Regex(String),
    /// A literal; no byte-level model cuts at one.
    String(serde::de::IgnoredAny),
}

fn yes() -> bool {
    true
}

impl PreSpec {
    fn by_hand(&self) -> Option<Cut> {
        use PreSpec::{ByteLevel, Digits, Sequence, Split};
        match self {
            ByteLevel { add_prefix_space: false, use_regex: true } => Some(Cut::Gpt2 { each_digit: false }),
            Sequence { pretokenizers } => match pretokenizers.as_slice() {
                [
                    Digits { individual_digits: true },
                    ByteLevel { add_prefix_space: false, use_regex: true },
                ] => Some(Cut::Gpt2 { each_digit: true }),
                [
                    Split { pattern: PatternSpec::Regex(pattern), behavior, invert: false },
                    ByteLevel { add_prefix_space: false, use_regex: false },
                ] if behavior == "Isolated" => pre::pattern_by_hand(pattern),
                _ => None,
            },
            _ => None,
        }
    }
}

/// Our own pipeline, where it gives the ids that the library gives. Anything unusual is left to the library.
fn by_hand(spec: Spec, hf: &tokenizers::Tokenizer, entries: &Entries) -> Option<Pipeline> {
    let ModelWrapper::BPE(bpe) = hf.get_model() else { return None };
    let usual = bpe.dropout.is_none()
        && bpe.unk_token.is_none()
        && !bpe.byte_fallback
        && bpe.continuing_subword_prefix.as_ref().is_none_or(String::is_empty)
        && bpe.end_of_word_suffix.as_ref().is_none_or(String::is_empty);
    let nfc = match hf.get_normalizer() {
        None => false,
        Some(NormalizerWrapper::NFC(_)) => true,
        Some(_) => return None,
    };
    if !usual || !matches!(hf.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
        return None;
    }
    let cut = spec.pre_tokenizer?.by_hand()?;
    let merges = spec.model.merges.into_iter().map(|merge| match merge {
        MergeSpec::Text(text) => text,
        MergeSpec::Pair(left, right) => format!("{left} {right}"),
    });
    let bpe = own_bpe(entries, &merges.collect::<Vec<_>>(), bpe.ignore_merges).ok()?;
    Some(Pipeline::ByHand { nfc, cut, bpe: Box::new(bpe) })
}

type Tokens = (Entries, Vec<AddedToken>, Vec<AddedToken>);

fn read_tokens(hf: &tokenizers::Tokenizer, spelling: &Spelling) -> Result<Tokens, BuildError> {
    let mut by_id: Vec<(TokenId, String)> =
        hf.get_vocab(true).into_iter().map(|(text, id)| (id, text)).collect();
    by_id.sort_unstable();
    let count = by_id.last().map_or(0, |(id, _)| *id as usize + 1);
    if count > TOKENS_MAX {
        return Err(BuildError::TooLarge { tokens: count, limit: TOKENS_MAX });
    }
    let added = hf.get_added_tokens_decoder();
    let mut entries = Entries::default();
    let (mut controls, mut user_defined) = (Vec::new(), Vec::new());
    for (id, text) in by_id {
        // Ids may have gaps (padding of the model's matrix); an id between has no text.
        while entries.len() < id as usize {
            entries.push(String::new(), TokenType::Unused, |_, _| ());
        }
        // The same id twice: an added token is spelled as in the model's vocabulary too.
        if entries.len() > id as usize {
            continue;
        }
        match added.get(&id) {
            Some(token) => {
                let ours = AddedToken {
                    id,
                    text: token.content.clone(),
                    lstrip: token.lstrip,
                    rstrip: token.rstrip,
                    single_word: token.single_word,
                };
                let text = token.content.clone();
                if token.special {
                    controls.push(ours);
                    entries
                        .push(text, TokenType::Control, |text, out| out.extend_from_slice(text.as_bytes()));
                } else {
                    user_defined.push(ours);
                    // They go through the decoder like any other: Gemma has runs of `▁` among them.
                    entries.push(text, TokenType::UserDefined, |text, out| spelling.bytes_of(text, out));
                }
            }
            None => entries.push(text, TokenType::Normal, |text, out| spelling.bytes_of(text, out)),
        }
    }
    Ok((entries, controls, user_defined))
}

/// What the post-processor puts before and after a single text: found by giving it one token and looking around it.
fn around(processor: &PostProcessorWrapper) -> tokenizers::Result<(Vec<TokenId>, Vec<TokenId>)> {
    const TEXT: TokenId = TokenId::MAX;
    let text = Encoding::from_tokens(vec![Token::new(TEXT, "x".to_owned(), (0, 1))], 0);
    let encoding = processor.process(text, None, true)?;
    let ids = encoding.get_ids();
    let at = ids.iter().position(|id| *id == TEXT).ok_or("the post-processor drops the text")?;
    Ok((ids[..at].to_vec(), ids[at + 1..].to_vec()))
}

/// How a token's text spells its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's alphabet.
    ByteLevel,
    /// `▁` is a space, `<0x0A>` a byte. `strip`: the text's first space was put there by the normalizer.
    SentencePiece { strip: bool },
    /// `##` continues a word, anything else starts one.
    WordPiece { prefix: String },
    /// The text itself.
    Plain { strip: bool },
}

impl Spelling {
    fn of(decoder: &DecoderWrapper) -> Result<Self, BuildError> {
        match decoder {
            DecoderWrapper::ByteLevel(_) => Ok(Self::ByteLevel),
            DecoderWrapper::Metaspace(_) => Ok(Self::SentencePiece { strip: true }),
            DecoderWrapper::WordPiece(word) => Ok(Self::WordPiece { prefix: word.prefix.clone() }),
            DecoderWrapper::ByteFallback(_) => Ok(Self::SentencePiece { strip: false }),
            DecoderWrapper::Fuse(_) => Ok(Self::Plain { strip: false }),
            DecoderWrapper::Strip(strip) if strip.content == ' ' && strip.start == 1 && strip.stop == 0 => {
                Ok(Self::Plain { strip: true })
            }
            // `Replace` keeps its pattern to itself; the one in use is `▁` by a space.
            DecoderWrapper::Replace(_) => Ok(Self::SentencePiece { strip: false }),
            DecoderWrapper::Sequence(steps) => steps
                .get_decoders()
                .iter()
                .map(Self::of)
                .try_fold(Self::Plain { strip: false }, |all, step| Ok(all.and(step?))),
            DecoderWrapper::BPE(_) => Err(BuildError::UnknownDecoder { decoder: "BPEDecoder".to_owned() }),
            DecoderWrapper::CTC(_) => Err(BuildError::UnknownDecoder { decoder: "CTC".to_owned() }),
            DecoderWrapper::Strip(strip) => Err(BuildError::UnknownDecoder {
                decoder: format!("Strip({:?}, {}, {})", strip.content, strip.start, strip.stop),
            }),
        }
    }

    /// Two steps of a sequence: the more specific spelling, stripped if either strips.
    fn and(self, step: Self) -> Self {
        let strip = self.strips_first_space() || step.strips_first_space();
        match (self, step) {
            (Self::Plain { .. }, Self::Plain { .. }) => Self::Plain { strip },
            (Self::SentencePiece { .. }, _) | (Self::Plain { .. }, Self::SentencePiece { .. }) => {
                Self::SentencePiece { strip }
            }
            (Self::Plain { .. }, other) | (other, _) => other,
        }
    }

    fn strips_first_space(&self) -> bool {
        match self {
            Self::ByteLevel => false,
            Self::SentencePiece { strip } | Self::Plain { strip } => *strip,
            Self::WordPiece { .. } => true,
        }
    }

    fn bytes_of(&self, text: &str, out: &mut Vec<u8>) {
        match self {
            Self::ByteLevel => alphabet::bytes_of(text, out),
            Self::SentencePiece { .. } => match byte_token(text) {
                Some(byte) => out.push(byte),
                None => out.extend_from_slice(text.replace('▁', " ").as_bytes()),
            },
            Self::WordPiece { prefix } => match text.strip_prefix(prefix.as_str()) {
                Some(rest) => out.extend_from_slice(rest.as_bytes()),
                None => {
                    out.push(b' ');
                    out.extend_from_slice(text.as_bytes());
                }
            },
            Self::Plain { .. } => out.extend_from_slice(text.as_bytes()),
        }
    }
}

/// `<0x0A>` is the byte 10.
fn byte_token(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::Special;
    use serde_json::{Value, json};

    const TINY: &str = include_str!("../tests/fixtures/tiny.json");

    fn load(change: impl FnOnce(&mut Value)) -> Result<Tokenizer, BuildError> {
        let mut spec: Value = serde_json::from_str(TINY).unwrap();
        change(&mut spec);
        Tokenizer::from_json(spec.to_string().as_bytes(), None, None)
    }

    /// The file as changed, and the same with a no-op that keeps it from our own pipeline.
    fn check_same_ids(change: impl Fn(&mut Value)) {
        let own = load(&change).unwrap();
        let library = load(|spec| {
            change(spec);
            let normalizer = spec["normalizer"].take();
            let steps = if normalizer.is_null() { vec![] } else { vec![normalizer] };
            spec["normalizer"] = json!({"type": "Sequence", "normalizers": steps});
        })
        .unwrap();
        assert!(own.is_by_hand() && !library.is_by_hand());
        for text in [
            "",
            "The turbines, 12345 of them!\n\n  e\u{301} ﬁn <|im_start|> <tool_call>x",
            "e\u{301}",
            "東京 は",
        ] {
            for special in [Special::NONE, Special::ALL] {
                let expect = library.encode(text, special).unwrap();
                assert_eq!(own.encode(text, special).unwrap(), expect, "{text:?}");
            }
        }
    }

    #[test]
    fn own_pipeline_gives_the_ids_of_the_library() {
        let split = |pattern: &str| {
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            ]})
        };
        let llama = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        check_same_ids(|_| ());
        check_same_ids(|spec| spec["normalizer"] = json!({"type": "NFC"}));
        check_same_ids(|spec| spec["pre_tokenizer"] = split(llama));
        check_same_ids(|spec| spec["model"]["ignore_merges"] = json!(true));
        let digits = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]});
        check_same_ids(|spec| spec["pre_tokenizer"] = digits.clone());
    }

    #[test]
    fn what_our_pipeline_does_not_know_goes_to_the_library() {
        let goes = |change: fn(&mut Value)| assert!(!load(change).unwrap().is_by_hand());
        goes(|spec| spec["normalizer"] = json!({"type": "Lowercase"}));
        goes(|spec| spec["pre_tokenizer"]["add_prefix_space"] = json!(true));
        goes(|spec| spec["pre_tokenizer"] = json!({"type": "Whitespace"}));
        goes(|spec| spec["model"]["unk_token"] = json!("<|endoftext|>"));
    }

    /// Llama 2's kind: `▁` for spaces, bytes as `<0x..>`, a space put in front and taken away again.
    #[test]
    fn sentencepiece_spelling() {
        let vocab: serde_json::Map<String, Value> =
            ["<unk>", "<s>", "<0x0A>", "<0xC3>", "<0xA9>", "▁", "h", "i", "▁h"]
                .iter()
                .enumerate()
                .map(|(id, text)| ((*text).to_owned(), json!(id)))
                .collect();
        let added = |id: u32, text: &str| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        // As Gemma has them.
        let run_of_spaces = json!({"id": 9, "content": "▁▁", "single_word": false, "lstrip": false, "rstrip": false,
                                   "normalized": false, "special": false});
        let spec = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [added(0, "<unk>"), added(1, "<s>"), run_of_spaces],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]},
            "pre_tokenizer": null,
            "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
            "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "fuse_unk": true,
                      "vocab": vocab, "merges": [["▁", "h"]]},
        })
        .to_string();
        let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "<unk>"}).to_string();
        let generation = json!({"eos_token_id": [7, 0]}).to_string();
        let tokenizer =
            Tokenizer::from_json(spec.as_bytes(), Some(config.as_bytes()), Some(generation.as_bytes()))
                .unwrap();
        let ids = tokenizer.encode("hi é\n", Special::NONE).unwrap();
        assert_eq!(ids, [8, 7, 5, 3, 4, 2]);
        assert_eq!(tokenizer.decode(&ids, true), "hi é\n");
        assert_eq!(tokenizer.token_bytes(8), b" h");
        assert_eq!(tokenizer.token_bytes(9), b"  ");
        assert_eq!(tokenizer.decode(&[8, 7, 9, 7], true), "hi  i");
        assert_eq!(tokenizer.encode("<s>", Special::PARSE).unwrap(), [1]);
        assert_eq!(tokenizer.eog(), [0, 7]);
    }

    /// Models that look whole words up would find a control token that a client wrote as a word.
    #[test]
    fn a_word_lookup_makes_no_control_token() {
        let special = |id: u32, text: &str| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        let spec = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [special(0, "[UNK]"), special(1, "</s>")],
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "</s>": 1, "word": 2}},
        });
        let tokenizer = Tokenizer::from_json(spec.to_string().as_bytes(), None, None).unwrap();
        assert_eq!(tokenizer.encode("word </s> other", Special::NONE).unwrap(), [2, 0]);
        assert_eq!(tokenizer.encode("word </s> other", Special::PARSE).unwrap(), [2, 1, 0]);
        assert_eq!(tokenizer.unk(), Some(0));
    }

    #[test]
    fn what_the_library_panics_on_is_an_error() {
        let at = TINY.find("\"decoder\"").unwrap();
        for broken in [&TINY[..at + 20], &TINY.replace("\"ByteLevel\"", "\"\\uD800\"")] {
            let error = Tokenizer::from_json(broken.as_bytes(), None, None).unwrap_err();
            assert!(matches!(error, BuildError::Library(_)), "{error:?}");
        }
    }

    #[test]
    fn an_unknown_decoder_is_an_error() {
        let error = load(|spec| {
            spec["decoder"] =
                json!({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true})
        });
        assert_eq!(error.unwrap_err().to_string(), "the decoder `CTC` of tokenizer.json is not supported");
    }
}
