//! The tokenizer: text to ids and back.
//!
//! Byte-level BPE with one of the usual patterns (GPT-2, SmolLM, Llama 3, Qwen) goes through `words.rs` and `bpe.rs`,
//! the plain data of a SentencePiece model through `spm.rs`: no cache. Everything else is the `tokenizers` crate's (normalizer,
//! pre-tokenizer, model), which is about 20 times slower and keeps up to 10,000 words per thread (each under 256
//! bytes). Neither shares state between threads, so `encode` scales with cores.
//!
//! Around them stands what that crate does not give: control tokens per call ([`Special`]), the raw bytes of a token
//! in O(1), and an identity ([`TokenizerId`]).

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use ahash::AHashSet;
use forebay_types::{Blame, Class, Classify, Code, TokenId};
use tokenizers::normalizer::Range as TextRange;
use tokenizers::normalizers::NFC;
use tokenizers::{
    Model, ModelWrapper, NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential, OffsetType,
    PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Token,
};

use crate::added::{AddedTokens, Segment};
use crate::bpe::{ByteBpe, Scratch};
use crate::guard::Guard;
use crate::spm::{self, Spm};
use crate::vocab::{BuildError, TokenType};
use crate::words::Cut;

/// Longest text that is encoded in one call. The library keeps about 40 bytes per byte of text while it works.
pub(crate) const TEXT_BYTES_MAX: usize = 16 << 20;

/// Which special tokens a call may produce.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Special {
    /// Put in what the model wants around a text that is not a rendered template (`bos`).
    pub add: bool,
    /// Turn the text of a control token (`<|im_end|>`) into that token. For text we trust only.
    pub parse: bool,
}

impl Special {
    /// Untrusted text: no control tokens at all.
    pub const NONE: Self = Self { add: false, parse: false };
    /// Untrusted text as a whole prompt.
    pub const ADD: Self = Self { add: true, parse: false };
    /// A rendered template: it has written its own `bos`.
    pub const PARSE: Self = Self { add: false, parse: true };
    /// A raw prompt by someone who may write control tokens: the completions API.
    pub const ALL: Self = Self { add: true, parse: true };
}

pub use forebay_types::TokenizerId;

/// Why a text could not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    #[error("the prompt has {bytes} bytes, the limit is {limit}")]
    TooLong { bytes: usize, limit: usize },
    /// The library failed on valid input: a defect of the vocabulary (a missing unknown token) or of the library.
    #[error("the tokenizer failed")]
    Library(#[source] tokenizers::Error),
}

impl Classify for EncodeError {
    fn class(&self) -> Class {
        match self {
            Self::TooLong { .. } => Class::new(Code::ContextLengthExceeded, Blame::Client),
            Self::Library(_) => Class::new(Code::Internal, Blame::Us),
        }
    }
}

/// A tokenizer. A cheap clone of shared, immutable data.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    id: TokenizerId,
    pipeline: Pipeline,
    controls: AddedTokens,
    user_defined: AddedTokens,
    guard: Guard,
    prefix: Vec<TokenId>,
    suffix: Vec<TokenId>,
    entries: Entries,
    roles: Roles,
    strip_first_space: bool,
}

/// How text without whole-string tokens becomes ids.
pub(crate) enum Pipeline {
    ByHand {
        /// Normalize to NFC first.
        nfc: bool,
        cut: Cut,
        bpe: Box<ByteBpe>,
    },
    SentencePiece(Box<Spm>),
    Library(Box<LibraryPipeline>),
}

pub(crate) struct LibraryPipeline {
    pub(crate) normalizer: Option<NormalizerWrapper>,
    pub(crate) pre_tokenizer: Option<PreTokenizerWrapper>,
    pub(crate) model: ModelWrapper,
    /// Control tokens that stand in the model's own vocabulary: a model that looks up whole words (Unigram,
    /// WordLevel) would make them of plain text, so they are dropped from what it says.
    pub(crate) never: AHashSet<TokenId>,
}

/// Ids with a role. `eog` is every token that ends a generation, `eos` and `eot` among them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Roles {
    pub(crate) bos: Option<TokenId>,
    pub(crate) eos: Option<TokenId>,
    pub(crate) eot: Option<TokenId>,
    pub(crate) unk: Option<TokenId>,
    pub(crate) pad: Option<TokenId>,
    pub(crate) eog: Vec<TokenId>,
}

/// What is known of each id: its text in the vocabulary, its bytes and its type.
#[derive(Default)]
pub(crate) struct Entries {
    texts: Vec<String>,
    bytes: Vec<u8>,
    /// `bytes[ends[id - 1]..ends[id]]`.
    ends: Vec<u32>,
    types: Vec<TokenType>,
}

impl Entries {
    pub(crate) fn push(
        &mut self,
        text: String,
        kind: TokenType,
        write_bytes: impl FnOnce(&str, &mut Vec<u8>),
    ) {
        write_bytes(&text, &mut self.bytes);
        self.ends
            .push(u32::try_from(self.bytes.len()).expect("vocabularies are limited to far less than 4 GiB"));
        self.texts.push(text);
        self.types.push(kind);
    }

    pub(crate) fn len(&self) -> usize {
        self.texts.len()
    }

    pub(crate) fn kind(&self, id: TokenId) -> Option<TokenType> {
        self.types.get(id as usize).copied()
    }

    pub(crate) fn text(&self, id: TokenId) -> Option<&str> {
        self.texts.get(id as usize).map(String::as_str)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (TokenId, &str, TokenType)> {
        (0..).zip(&self.texts).zip(&self.types).map(|((id, text), kind)| (id, text.as_str(), *kind))
    }

    pub(crate) fn bytes(&self, id: TokenId) -> &[u8] {
        let id = id as usize;
        let Some(end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..*end as usize]
    }
}

/// The parts of a tokenizer, however it was described.
pub(crate) struct Parts {
    pub(crate) id: TokenizerId,
    pub(crate) pipeline: Pipeline,
    pub(crate) controls: AddedTokens,
    pub(crate) user_defined: AddedTokens,
    pub(crate) prefix: Vec<TokenId>,
    pub(crate) suffix: Vec<TokenId>,
    pub(crate) entries: Entries,
    pub(crate) roles: Roles,
    pub(crate) strip_first_space: bool,
}

/// Control tokens that end a generation whatever the model's metadata says: llama.cpp's list (`special_eog_ids`).
/// Files in the wild name only one of the two or three that their model uses.
const EOG_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<｜end▁of▁sentence｜>",
];

impl Tokenizer {
    pub(crate) fn from_parts(parts: Parts) -> Result<Self, BuildError> {
        let Parts { entries, mut roles, controls, .. } = parts;
        if entries.len() == 0 {
            return Err(BuildError::Empty);
        }
        for (role, id) in [
            ("bos", roles.bos),
            ("eos", roles.eos),
            ("eot", roles.eot),
            ("unk", roles.unk),
            ("pad", roles.pad),
        ] {
            if let Some(id) = id.filter(|id| *id as usize >= entries.len()) {
                return Err(BuildError::BadSpecialId { role, id, tokens: entries.len() });
            }
        }
        roles.eog.extend(roles.eos.into_iter().chain(roles.eot));
        roles.eog.extend((0..).zip(&entries.texts).filter_map(|(id, text)| {
            (entries.types[id as usize] == TokenType::Control && EOG_TEXTS.contains(&text.as_str()))
                .then_some(id)
        }));
        roles.eog.sort_unstable();
        roles.eog.dedup();
        let guard = Guard::new(controls.texts())?;
        Ok(Self {
            inner: Arc::new(Inner {
                id: parts.id,
                pipeline: parts.pipeline,
                controls,
                user_defined: parts.user_defined,
                guard,
                prefix: parts.prefix,
                suffix: parts.suffix,
                entries,
                roles,
                strip_first_space: parts.strip_first_space,
            }),
        })
    }

    pub fn id(&self) -> TokenizerId {
        self.inner.id
    }

    /// Ids of a text. Pure, no allocation per word.
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<TokenId>, EncodeError> {
        check_length(text)?;
        let mut segments = Vec::new();
        if special.parse {
            self.inner.controls.cut(text, 0..text.len(), &mut segments);
        } else {
            segments.push(Segment { range: 0..text.len(), id: None });
        }
        let ids = self.encode_segments(text, segments)?;
        Ok(if special.add { self.with_special(&ids) } else { ids })
    }

    /// Ids with what the model wants around a text.
    pub fn with_special(&self, ids: &[TokenId]) -> Vec<TokenId> {
        [&self.inner.prefix[..], ids, &self.inner.suffix].concat()
    }

    /// Ids of a template's output whose client text went through [`Tokenizer::guard`].
    pub(crate) fn encode_rendered(&self, rendered: &str) -> Result<Vec<TokenId>, EncodeError> {
        check_length(rendered)?;
        let mut found = Vec::new();
        self.inner.controls.cut(rendered, 0..rendered.len(), &mut found);
        let mut text = String::with_capacity(rendered.len());
        let mut segments = Vec::with_capacity(found.len());
        for Segment { range, id } in found {
            let start = text.len();
            match id {
                Some(_) => text.push_str(&rendered[range]),
                None => self.inner.guard.restore(&rendered[range], &mut text),
            }
            segments.push(Segment { range: start..text.len(), id });
        }
        self.encode_segments(&text, segments)
    }

    pub(crate) fn guard(&self) -> &Guard {
        &self.inner.guard
    }

    /// `segments` cover `text`; those without an id are cut at user-defined tokens and then into words.
    fn encode_segments(&self, text: &str, segments: Vec<Segment>) -> Result<Vec<TokenId>, EncodeError> {
        let inner = &*self.inner;
        let mut cut = Vec::with_capacity(segments.len());
        for segment in segments {
            match segment.id {
                Some(_) => cut.push(segment),
                None => inner.user_defined.cut(text, segment.range, &mut cut),
            }
        }
        match &inner.pipeline {
            Pipeline::ByHand { nfc, cut: pattern, bpe } => {
                let mut ids = Vec::with_capacity(text.len() / 3);
                let mut scratch = Scratch::default();
                for Segment { range, id } in cut {
                    let part = &text[range];
                    match id {
                        Some(id) => ids.push(id),
                        // ASCII is in NFC.
                        None if *nfc && !part.is_ascii() => {
                            let mut normal = NormalizedString::from(part);
                            NFC.normalize(&mut normal).map_err(EncodeError::Library)?;
                            pattern.words(normal.get(), |word| {
                                bpe.encode(word.as_bytes(), &mut scratch, &mut ids)
                            });
                        }
                        None => {
                            pattern.words(part, |word| bpe.encode(word.as_bytes(), &mut scratch, &mut ids));
                        }
                    }
                }
                Ok(ids)
            }
            Pipeline::SentencePiece(spm) => {
                let mut ids = Vec::with_capacity(text.len() / 3);
                let mut scratch = spm::Scratch::default();
                let mut is_start = true;
                for Segment { range, id } in cut {
                    match id {
                        Some(id) => ids.push(id),
                        None => spm.encode(&text[range], is_start, &mut scratch, &mut ids),
                    }
                    is_start = id.is_some();
                }
                Ok(ids)
            }
            Pipeline::Library(library) => library.run(text, &cut).map_err(EncodeError::Library),
        }
    }

    #[cfg(test)]
    pub(crate) fn is_by_hand(&self) -> bool {
        matches!(self.inner.pipeline, Pipeline::ByHand { .. })
    }

    /// Text of ids. With `skip_special`, control tokens are left out; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            if !(skip_special && self.is_special(id)) {
                bytes.extend_from_slice(self.token_bytes(id));
            }
        }
        if self.inner.strip_first_space && bytes.first() == Some(&b' ') {
            bytes.remove(0);
        }
        match String::from_utf8_lossy(&bytes) {
            Cow::Owned(text) => text,
            Cow::Borrowed(_) => String::from_utf8(bytes).expect("lossy conversion had nothing to replace"),
        }
    }

    /// The bytes a token adds to the text; empty for an id outside the vocabulary. May be half a character.
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.inner.entries.bytes(id)
    }

    /// The text a token adds, as a person reads it (log-probabilities): bytes that are not UTF-8 as U+FFFD.
    pub fn token_text(&self, id: TokenId) -> Cow<'_, str> {
        String::from_utf8_lossy(self.token_bytes(id))
    }

    /// The token as the vocabulary spells it (`Ġthe`), if there is one with this id.
    pub fn token_piece(&self, id: TokenId) -> Option<&str> {
        self.inner.entries.text(id)
    }

    /// The id of a token as the vocabulary spells it; control tokens by their text. Looks through the whole
    /// vocabulary: ask once, at start-up.
    pub fn id_of(&self, piece: &str) -> Option<TokenId> {
        let position = self.inner.entries.texts.iter().rposition(|text| text == piece)?;
        TokenId::try_from(position).ok()
    }

    /// A control token: left out of what a client reads.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.inner.entries.kind(id) == Some(TokenType::Control)
    }

    /// A token that ends the generation.
    pub fn is_eog(&self, id: TokenId) -> bool {
        self.inner.roles.eog.contains(&id)
    }

    /// All tokens that end a generation, ascending.
    pub fn eog(&self) -> &[TokenId] {
        &self.inner.roles.eog
    }

    pub fn bos(&self) -> Option<TokenId> {
        self.inner.roles.bos
    }

    pub fn eos(&self) -> Option<TokenId> {
        self.inner.roles.eos
    }

    pub fn unk(&self) -> Option<TokenId> {
        self.inner.roles.unk
    }

    pub fn pad(&self) -> Option<TokenId> {
        self.inner.roles.pad
    }

    /// What [`Special::add`] puts after a text.
    pub fn suffix(&self) -> &[TokenId] {
        &self.inner.suffix
    }

    /// Ids are below this; the model's output may be wider (padded), the ids beyond have no bytes.
    pub fn vocab_size(&self) -> usize {
        self.inner.entries.len()
    }
}

impl LibraryPipeline {
    /// The steps of `tokenizers::Tokenizer::encode`, with our cut in place of its own added-token search. One
    /// string for all segments, as there: some pre-tokenizers treat the start of the text differently.
    fn run(&self, text: &str, segments: &[Segment]) -> tokenizers::Result<Vec<TokenId>> {
        let mut pieces = PreTokenizedString::from(text);
        pieces.split(|_, whole| {
            segments
                .iter()
                .map(|segment| {
                    let slice = whole
                        .slice(TextRange::Original(segment.range.clone()))
                        .ok_or("a segment is not on character boundaries")?;
                    Ok((slice, segment.id.map(|id| vec![Token::new(id, String::new(), (0, 0))])))
                })
                .collect::<tokenizers::Result<Vec<(NormalizedString, Option<Vec<Token>>)>>>()
        })?;
        if let Some(normalizer) = &self.normalizer {
            pieces.normalize(|piece| normalizer.normalize(piece))?;
        }
        if let Some(pre_tokenizer) = &self.pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        pieces.tokenize(|piece| {
            let mut tokens = self.model.tokenize(piece.get())?;
            tokens.retain(|token| !self.never.contains(&token.id));
            Ok(tokens)
        })?;
        // `Normalized`, because the original offsets are never looked at and cost more.
        let splits = pieces.get_splits(OffsetReferential::Normalized, OffsetType::None);
        Ok(splits
            .into_iter()
            .filter_map(|(_, _, tokens)| tokens.as_ref())
            .flatten()
            .map(|token| token.id)
            .collect())
    }
}

fn check_length(text: &str) -> Result<(), EncodeError> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(EncodeError::TooLong { bytes: text.len(), limit: TEXT_BYTES_MAX });
    }
    Ok(())
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("id", &self.inner.id)
            .field("vocab_size", &self.vocab_size())
            .finish()
    }
}
