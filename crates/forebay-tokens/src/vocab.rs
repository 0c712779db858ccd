//! The plain data a tokenizer is built from, and why it may not be possible.

use forebay_types::{Blame, Class, Classify, Code, TokenId};
use sha2::{Digest, Sha256};
use tokenizers::models::bpe::BpeBuilder;

use crate::added::{AddedToken, AddedTokens};
use crate::alphabet;
use crate::pre;
use crate::tokenizer::{Entries, Parts, Roles, Tokenizer, TokenizerId};

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
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE).
    pub model: String,
    /// `tokenizer.ggml.pre`: how text is cut into words before BPE (`smollm`, `llama-bpe`, `qwen2`, ...).
    pub pre: String,
    /// Text by id, in the byte-level alphabet (`Ġthe`) for normal tokens, plain for control tokens.
    pub tokens: Vec<String>,
    /// `left right`, best first.
    pub merges: Vec<String>,
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
}

/// Why a tokenizer could not be built. Happens when a model is loaded, never for a request.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("tokenizer model `{model}` is not supported; supported are `gpt2` (byte-level BPE) and tokenizer.json")]
    UnknownModel { model: String },
    #[error("pre-tokenizer `{pre}` is not known; known are {}", crate::pre::names().collect::<Vec<_>>().join(", "))]
    UnknownPre { pre: String },
    #[error("the decoder `{decoder}` of tokenizer.json is not supported")]
    UnknownDecoder { decoder: String },
    #[error("merge {index} is `{merge}`, not two tokens with a space between")]
    BadMerge { index: usize, merge: String },
    #[error("the vocabulary has {tokens} tokens and {types} token types")]
    TypesMismatch { tokens: usize, types: usize },
    #[error("the {role} token is {id}, but the vocabulary has {tokens} tokens")]
    BadSpecialId { role: &'static str, id: TokenId, tokens: usize },
    #[error("the vocabulary is empty")]
    Empty,
    #[error("the vocabulary has {tokens} tokens, the limit is {limit}")]
    TooLarge { tokens: usize, limit: usize },
    #[error("token {id} does not exist in the tokenizer, but `{text}` must be it")]
    MissingToken { id: TokenId, text: String },
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
            | Self::TypesMismatch { .. }
            | Self::BadSpecialId { .. }
            | Self::Empty
            | Self::TooLarge { .. }
            | Self::MissingToken { .. }
            | Self::Json { .. }
            | Self::Library(_)
            | Self::Index(_) => Class::new(Code::Internal, Blame::Us),
        }
    }
}

impl Tokenizer {
    /// A byte-level BPE tokenizer from plain data. Takes about 0.2 s for 150,000 tokens.
    pub fn new(vocab: Vocab) -> Result<Self, BuildError> {
        if vocab.model != "gpt2" {
            return Err(BuildError::UnknownModel { model: vocab.model });
        }
        let (count, types) = (vocab.tokens.len(), vocab.token_types.len());
        if count > TOKENS_MAX {
            return Err(BuildError::TooLarge { tokens: count, limit: TOKENS_MAX });
        }
        if types != 0 && types != count {
            return Err(BuildError::TypesMismatch { tokens: count, types });
        }
        let (pre_tokenizer, ignore_merges) = pre::pre_tokenizer(&vocab.pre)?;
        let id = vocab.identity();
        let merges = vocab
            .merges
            .iter()
            .enumerate()
            .map(|(index, merge)| match merge.split_once(' ') {
                Some((left, right)) if !left.is_empty() && !right.is_empty() => {
                    Ok((left.to_owned(), right.to_owned()))
                }
                _ => Err(BuildError::BadMerge { index, merge: merge.clone() }),
            })
            .collect::<Result<Vec<_>, _>>()?;

        let mut entries = Entries::default();
        let mut words = Vec::with_capacity(count);
        let (mut controls, mut user_defined) = (Vec::new(), Vec::new());
        for (index, text) in vocab.tokens.into_iter().enumerate() {
            let id = TokenId::try_from(index).expect("TOKENS_MAX is far below u32::MAX");
            let kind = vocab.token_types.get(index).copied().unwrap_or_default();
            match kind {
                TokenType::Control => controls.push(AddedToken::plain(id, text.clone())),
                TokenType::UserDefined => user_defined.push(AddedToken::plain(id, text.clone())),
                // Whole-string tokens stay out of the model's own vocabulary: with `ignore_merges` a plain word
                // that happens to be spelled like one would become it.
                TokenType::Normal | TokenType::Unknown | TokenType::Unused | TokenType::Byte => {
                    words.push((text.clone(), id));
                }
            }
            let is_word = !matches!(kind, TokenType::Control | TokenType::UserDefined);
            entries.push(text, kind, |text, out| {
                if is_word { alphabet::bytes_of(text, out) } else { out.extend_from_slice(text.as_bytes()) }
            });
        }
        // Where a text occurs twice (padding tokens), the last id wins, as in llama.cpp.
        let words: tokenizers::models::bpe::Vocab = words.into_iter().collect();
        let model = BpeBuilder::new()
            .vocab_and_merges(words, merges)
            .ignore_merges(ignore_merges)
            .build()
            .map_err(BuildError::Library)?;
        Self::from_parts(Parts {
            id,
            model: model.into(),
            normalizer: None,
            pre_tokenizer: Some(pre_tokenizer),
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
            strip_first_space: false,
        })
    }
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
        TokenizerId(hash.finalize().into())
    }
}
