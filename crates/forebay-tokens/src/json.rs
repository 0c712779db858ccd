//! A tokenizer from Hugging Face's `tokenizer.json`, with the roles of its tokens from `tokenizer_config.json`.
//!
//! Takes the file's normalizer, pre-tokenizer, model, added tokens and post-processor; leaves its truncation and
//! padding alone, which are for training. Decoding covers the decoders of byte-level BPE, of SentencePiece and of
//! WordPiece, where each token has bytes of its own; WordPiece's clean-up of spaces before punctuation is not done.

use forebay_types::TokenId;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokenizers::{DecoderWrapper, Encoding, PostProcessor, PostProcessorWrapper, Token};

use crate::added::{AddedToken, AddedTokens};
use crate::alphabet;
use crate::tokenizer::{Entries, Parts, Roles, Tokenizer, TokenizerId};
use crate::vocab::{BuildError, TOKENS_MAX, TokenType};

/// `tokenizer_config.json`: only what names a token or holds a template.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct TokenizerConfig {
    pub(crate) bos_token: Option<TokenName>,
    pub(crate) eos_token: Option<TokenName>,
    pub(crate) unk_token: Option<TokenName>,
    pub(crate) pad_token: Option<TokenName>,
    pub(crate) chat_template: Option<TemplateText>,
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
        let config: TokenizerConfig =
            config.map_or(Ok(TokenizerConfig::default()), |json| parse("tokenizer_config.json", json))?;
        let generation: GenerationConfig =
            generation.map_or(Ok(GenerationConfig::default()), |json| parse("generation_config.json", json))?;
        let hf = tokenizers::Tokenizer::from_bytes(tokenizer).map_err(BuildError::Library)?;

        let spelling = hf.get_decoder().map(Spelling::of).transpose()?.unwrap_or(Spelling::Plain { strip: false });
        let (entries, controls, user_defined) = read_tokens(&hf, &spelling)?;
        let (prefix, suffix) =
            hf.get_post_processor().map(around).transpose().map_err(BuildError::Library)?.unwrap_or_default();
        let id_of = |name: &Option<TokenName>| name.as_ref().and_then(|name| hf.token_to_id(name.text()));
        let roles = Roles {
            bos: id_of(&config.bos_token),
            eos: id_of(&config.eos_token),
            eot: None,
            unk: id_of(&config.unk_token),
            pad: id_of(&config.pad_token),
            eog: match generation.eos_token_id {
                Some(OneOrMany::One(id)) => vec![id],
                Some(OneOrMany::Many(ids)) => ids,
                None => Vec::new(),
            },
        };
        Self::from_parts(Parts {
            id: identity(tokenizer),
            model: hf.get_model().clone(),
            normalizer: hf.get_normalizer().cloned(),
            pre_tokenizer: hf.get_pre_tokenizer().cloned(),
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

fn identity(tokenizer: &[u8]) -> TokenizerId {
    let mut hash = Sha256::new();
    hash.update("forebay tokenizer from tokenizer.json, 1");
    hash.update(tokenizer);
    TokenizerId(hash.finalize().into())
}

type Tokens = (Entries, Vec<AddedToken>, Vec<AddedToken>);

fn read_tokens(hf: &tokenizers::Tokenizer, spelling: &Spelling) -> Result<Tokens, BuildError> {
    let mut by_id: Vec<(TokenId, String)> = hf.get_vocab(true).into_iter().map(|(text, id)| (id, text)).collect();
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
                let kind = if token.special { TokenType::Control } else { TokenType::UserDefined };
                if token.special { controls.push(ours) } else { user_defined.push(ours) }
                entries.push(token.content.clone(), kind, |text, out| out.extend_from_slice(text.as_bytes()));
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
