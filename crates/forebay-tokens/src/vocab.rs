//! The plain data a tokenizer is built from, and why it may not be possible.

use ahash::{AHashMap, AHashSet};
use forebay_types::{Blame, Class, Classify, Code, TokenId};
use sha2::{Digest, Sha256};
use tokenizers::models::bpe::BPE;

use crate::added::{AddedToken, AddedTokens};
use crate::alphabet;
use crate::bpe::ByteBpe;
use crate::pre;
use crate::spm::{self, Spm};
use crate::tokenizer::{Entries, LibraryPipeline, Parts, Pipeline, Roles, Tokenizer, TokenizerId};

/// The largest published vocabularies have 262,144 tokens.
pub(crate) const TOKENS_MAX: usize = 1 << 21;

/// What a token is for. The numbers are GGUF's `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum TokenType {
    #[default]
    Normal = 1,
    Unknown = 2,
    /// Steers the model (`<|im_end|>`): made from template text only, and left out of what a client reads.
    Control = 3,
    /// A whole word of the model's author (`<tool_call>`): found in any text, printed like any text.
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

impl TokenType {
    /// Reads GGUF's number; an unknown one is `Normal`.
    pub fn from_gguf(number: i64) -> Self {
        match number {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }
}

/// A vocabulary as plain data: the `tokenizer.ggml.*` keys of a GGUF, field by field.
#[derive(Debug, Clone, Default)]
pub struct Vocab {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece's BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: how text is cut into words before BPE (`smollm`, `llama-bpe`, `qwen2`, ...). `gpt2` only.
    pub pre: String,
    /// Text by id, for normal tokens in the byte-level alphabet (`Ġthe`) or with `▁` for spaces; plain for control
    /// tokens.
    pub tokens: Vec<String>,
    /// `left right`, best first. `gpt2` only.
    pub merges: Vec<String>,
    /// By id, the best is joined first. `llama` only.
    pub scores: Vec<f32>,
    /// By id; empty means all normal.
    pub token_types: Vec<TokenType>,
    pub bos: Option<TokenId>,
    pub eos: Option<TokenId>,
    /// End of turn, where a model has one beside `eos`.
    pub eot: Option<TokenId>,
    pub unk: Option<TokenId>,
    pub pad: Option<TokenId>,
    /// Put `bos` before a text that is not a rendered template.
    pub add_bos: bool,
    /// Begin a text with a space, as if a word came before. `llama` only.
    pub add_space_prefix: bool,
}

/// Why a tokenizer could not be built. Happens when a model is loaded, never for a request.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error(
        "tokenizer model `{model}` is not supported; supported are `gpt2` (byte-level BPE), `llama` (SentencePiece's BPE) and \
         tokenizer.json"
    )]
    UnknownModel { model: String },
    #[error("pre-tokenizer `{pre}` is not known; known are {}", crate::pre::names().collect::<Vec<_>>().join(", "))]
    UnknownPre { pre: String },
    #[error("the decoder `{decoder}` of tokenizer.json is not supported")]
    UnknownDecoder { decoder: String },
    #[error("merge {index} is `{merge}`, not two tokens with a space between")]
    BadMerge { index: usize, merge: String },
    #[error("merge {index} needs the token `{text}`, which the vocabulary lacks")]
    UnknownMerge { index: usize, text: String },
    #[error("the vocabulary has {tokens} tokens and {types} token types")]
    TypesMismatch { tokens: usize, types: usize },
    #[error("the vocabulary has {tokens} tokens and {scores} scores")]
    ScoresMismatch { tokens: usize, scores: usize },
    #[error("the {role} token is {id}, but the vocabulary has {tokens} tokens")]
    BadSpecialId { role: &'static str, id: TokenId, tokens: usize },
    #[error("the vocabulary is empty")]
    Empty,
    #[error("the vocabulary has {tokens} tokens, the limit is {limit}")]
    TooLarge { tokens: usize, limit: usize },
    #[error("cannot read {file}")]
    Json {
        file: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error("the tokenizers library refused the vocabulary")]
    Library(#[source] tokenizers::Error),
    #[error("the control tokens cannot be indexed")]
    Index(#[source] aho_corasick::BuildError),
}

impl Classify for BuildError {
    fn class(&self) -> Class {
        match self {
            Self::UnknownModel { .. } | Self::UnknownPre { .. } | Self::UnknownDecoder { .. } => {
                Class::new(Code::NotSupported, Blame::Us)
            }
            Self::BadMerge { .. }
            | Self::UnknownMerge { .. }
            | Self::TypesMismatch { .. }
            | Self::ScoresMismatch { .. }
            | Self::BadSpecialId { .. }
            | Self::Empty
            | Self::TooLarge { .. }
            | Self::Json { .. }
            | Self::Library(_)
            | Self::Index(_) => Class::new(Code::Internal, Blame::Us),
        }
    }
}

impl Tokenizer {
    /// A tokenizer from plain data.
    pub fn new(vocab: Vocab) -> Result<Self, BuildError> {
        let spelling: fn(&str, &mut Vec<u8>) = match vocab.model.as_str() {
            "gpt2" => alphabet::bytes_of,
            "llama" => spm::bytes_of,
            _ => return Err(BuildError::UnknownModel { model: vocab.model }),
        };
        let is_spm = vocab.model == "llama";
        let (count, types) = (vocab.tokens.len(), vocab.token_types.len());
        if count > TOKENS_MAX {
            return Err(BuildError::TooLarge { tokens: count, limit: TOKENS_MAX });
        }
        if types != 0 && types != count {
            return Err(BuildError::TypesMismatch { tokens: count, types });
        }
        let scores = vocab.scores.len();
        if is_spm && scores != count {
            return Err(BuildError::ScoresMismatch { tokens: count, scores });
        }
        let id = vocab.identity();
        let mut entries = Entries::default();
        let (mut controls, mut user_defined) = (Vec::new(), Vec::new());
        for (id, text) in (0..).zip(vocab.tokens) {
            let kind = vocab.token_types.get(id as usize).copied().unwrap_or_default();
            match kind {
                TokenType::Control => controls.push(AddedToken::plain(id, text.clone())),
                TokenType::UserDefined => user_defined.push(AddedToken::plain(id, text.clone())),
                TokenType::Normal | TokenType::Unknown | TokenType::Unused | TokenType::Byte => {}
            }
            entries.push(text, kind, |text, out| match kind {
                TokenType::Control | TokenType::UserDefined => out.extend_from_slice(text.as_bytes()),
                TokenType::Normal | TokenType::Unknown | TokenType::Unused => spelling(text, out),
                TokenType::Byte => match spm::byte_of(text).filter(|_| is_spm) {
                    Some(byte) => out.push(byte),
                    None => spelling(text, out),
                },
            });
        }
        let pipeline = if is_spm {
            let spm = own_spm(&entries, &vocab.scores, vocab.unk, vocab.add_space_prefix);
            Pipeline::SentencePiece(Box::new(spm))
        } else {
            byte_level(&entries, &vocab.pre, &vocab.merges)?
        };
        Self::from_parts(Parts {
            id,
            pipeline,
            controls: AddedTokens::new(controls)?,
            user_defined: AddedTokens::new(user_defined)?,
            prefix: vocab.bos.filter(|_| vocab.add_bos).into_iter().collect(),
            suffix: Vec::new(),
            entries,
            roles: Roles {
                bos: vocab.bos,
                eos: vocab.eos,
                eot: vocab.eot,
                unk: vocab.unk,
                pad: vocab.pad,
                eog: Vec::new(),
            },
            strip_first_space: is_spm && vocab.add_space_prefix,
        })
    }
}

fn byte_level(entries: &Entries, pre: &str, merges: &[String]) -> Result<Pipeline, BuildError> {
    let pre = pre::find(pre)?;
    Ok(match pre.by_hand() {
        Some(cut) => {
            Pipeline::ByHand { nfc: false, cut, bpe: Box::new(own_bpe(entries, merges, pre.ignore_merges)?) }
        }
        None => Pipeline::Library(Box::new(LibraryPipeline {
            normalizer: None,
            pre_tokenizer: Some(pre.by_library()?),
            model: library_bpe(entries, merges, pre.ignore_merges)?.into(),
            // The model's vocabulary was made without them.
            never: AHashSet::new(),
        })),
    })
}

fn own_spm(entries: &Entries, scores: &[f32], unknown: Option<TokenId>, space_prefix: bool) -> Spm {
    let mut bytes = [None; 256];
    for (id, text, kind) in entries.iter() {
        if kind != TokenType::Control
            && let Some(byte) = spm::byte_of(text)
        {
            bytes[usize::from(byte)] = Some(id);
        }
    }
    let tokens = entries.iter().filter_map(|(id, text, kind)| match kind {
        TokenType::Normal | TokenType::UserDefined | TokenType::Unused => {
            Some((text, id, scores[id as usize]))
        }
        TokenType::Control | TokenType::Unknown | TokenType::Byte => None,
    });
    Spm::new(tokens, bytes, unknown, space_prefix)
}

/// What words may become. Control tokens are left out: with `ignore_merges` a plain word that happens to be spelled
/// like one would become it. Where a text occurs twice (padding), the last id wins, as in llama.cpp.
fn words(entries: &Entries) -> impl Iterator<Item = (&str, TokenId)> {
    entries.iter().filter(|(_, _, kind)| *kind != TokenType::Control).map(|(id, text, _)| (text, id))
}

fn split_merge((index, merge): (usize, &String)) -> Result<(&str, &str), BuildError> {
    match merge.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() => Ok((left, right)),
        _ => Err(BuildError::BadMerge { index, merge: merge.clone() }),
    }
}

pub(crate) fn own_bpe(
    entries: &Entries,
    merges: &[String],
    ignore_merges: bool,
) -> Result<ByteBpe, BuildError> {
    let by_text: AHashMap<&str, TokenId> = words(entries).collect();
    let mut ids = Vec::with_capacity(merges.len());
    let mut joined = String::new();
    for (index, merge) in merges.iter().enumerate() {
        let (left, right) = split_merge((index, merge))?;
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        let id = |text: &str| {
            by_text
                .get(text)
                .copied()
                .ok_or_else(|| BuildError::UnknownMerge { index, text: text.to_owned() })
        };
        ids.push((id(left)?, id(right)?, id(&joined)?));
    }
    let tokens = words(entries).map(|(_, id)| (entries.bytes(id), id));
    Ok(ByteBpe::new(tokens, ids.into_iter(), ignore_merges))
}

fn library_bpe(entries: &Entries, merges: &[String], ignore_merges: bool) -> Result<BPE, BuildError> {
    let vocab: tokenizers::models::bpe::Vocab =
        words(entries).map(|(text, id)| (text.to_owned(), id)).collect();
    let merges = merges
        .iter()
        .enumerate()
        .map(|merge| split_merge(merge).map(|(left, right)| (left.to_owned(), right.to_owned())))
        .collect::<Result<_, _>>()?;
    BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(ignore_merges)
        .build()
        .map_err(BuildError::Library)
}

impl Vocab {
    /// Hash of everything that decides which ids a text gets. Lengths go in too, so that no two vocabularies
    /// write the same bytes.
    fn identity(&self) -> TokenizerId {
        let mut hash = Sha256::new();
        let mut put = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        };
        put("forebay tokenizer from plain data, 1");
        put(&self.model);
        put(&self.pre);
        put(&self.tokens.len().to_string());
        for (index, token) in self.tokens.iter().enumerate() {
            put(token);
            put(match self.token_types.get(index).copied().unwrap_or_default() {
                TokenType::Control => "control",
                TokenType::UserDefined => "user",
                _ => "",
            });
        }
        self.merges.iter().for_each(|merge| put(merge));
        put(&format!("{:?} {}", self.bos, self.add_bos));
        if self.model == "llama" {
            self.scores.iter().for_each(|score| put(&score.to_bits().to_string()));
            put(&format!("{:?} {}", self.unk, self.add_space_prefix));
        }
        TokenizerId(hash.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vocab() -> Vocab {
        let list = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
        Vocab {
            model: "gpt2".into(),
            pre: "smollm".into(),
            tokens: list(&["a", "b", "ab", "<|im_end|>"]),
            merges: list(&["a b"]),
            ..Vocab::default()
        }
    }

    fn check(change: impl FnOnce(&mut Vocab), expect: &str) {
        let mut vocab = vocab();
        change(&mut vocab);
        let message = Tokenizer::new(vocab).unwrap_err().to_string();
        assert!(message.starts_with(expect), "{message}");
    }

    #[test]
    fn says_what_is_wrong_with_a_vocabulary() {
        assert!(Tokenizer::new(vocab()).is_ok());
        check(|v| v.model = "t5".into(), "tokenizer model `t5` is not supported; supported are `gpt2`");
        check(|v| v.pre = "new".into(), "pre-tokenizer `new` is not known; known are smollm, starcoder");
        check(|v| v.merges.push("ab".into()), "merge 1 is `ab`, not two tokens");
        check(|v| v.merges.push("b a".into()), "merge 1 needs the token `ba`");
        check(|v| v.token_types = vec![TokenType::Normal], "the vocabulary has 4 tokens and 1 token types");
        check(|v| v.model = "llama".into(), "the vocabulary has 4 tokens and 0 scores");
        check(|v| v.eos = Some(4), "the eos token is 4, but the vocabulary has 4 tokens");
        check(
            |v| {
                v.tokens.clear();
                v.merges.clear();
            },
            "the vocabulary is empty",
        );
    }

    #[test]
    fn the_identity_is_of_everything_that_decides_ids() {
        let id = |change: fn(&mut Vocab)| {
            let mut vocab = vocab();
            change(&mut vocab);
            Tokenizer::new(vocab).unwrap().id()
        };
        let same = id(|_| ());
        assert_eq!(same, id(|v| v.pad = Some(0)));
        for other in [
            id(|v| v.pre = "gpt-2".into()),
            id(|v| v.tokens[3] = "x".into()),
            id(|v| v.merges.clear()),
            id(|v| {
                v.token_types =
                    vec![TokenType::Normal, TokenType::Normal, TokenType::Normal, TokenType::Control]
            }),
        ] {
            assert_ne!(same, other);
        }
    }
}
