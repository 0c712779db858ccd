//! From a payload to a replica's events.

use std::time::Duration;

use forebay_types::TokenId;
use rmp::Marker;

use super::{BATCH_BYTES_MAX, Epoch, EventBatch, Medium, ReplicaEvent};
use crate::CacheSalt;

/// Why a payload is not a batch of events. What is merely unknown in one is no error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("the batch has {bytes} bytes, the limit is {BATCH_BYTES_MAX}")]
    TooLarge { bytes: usize },
    #[error("the batch is not whole MessagePack")]
    MessagePack,
    #[error("the batch is not `[time, [event, ...], rank]`")]
    Shape,
    #[error("the load report is not `[\"LoadStat\", number, ...]`")]
    Load,
}

/// Fields of the events that were arrays, after their type.
const STORED: &[&str] = &[
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
];
const REMOVED: &[&str] = &["block_hashes", "medium", "group_idx"];

/// Items for which memory is taken on an array's word; for more, as they come.
const RESERVED_MAX: usize = 4096;

/// Kinds of attention for which a block can be used wherever all blocks before it are there.
const PREFIX_KINDS: &[&[u8]] = &[b"full_attention", b"mla_attention", b"sink_full_attention"];

/// Reads one payload. Takes memory in proportion to it (at most eight times), whatever lengths it claims.
pub fn decode_batch(payload: &[u8]) -> Result<EventBatch, DecodeError> {
    if payload.len() > BATCH_BYTES_MAX {
        return Err(DecodeError::TooLarge { bytes: payload.len() });
    }
    let mut cursor = Cursor { rest: payload };
    let Token::Array(fields @ 2..) = cursor.token()? else { return Err(DecodeError::Shape) };
    let ts = match cursor.token()? {
        Token::Float(seconds) => seconds,
        Token::Int(seconds) => seconds as f64,
        _ => return Err(DecodeError::Shape),
    };
    let Token::Array(count) = cursor.token()? else { return Err(DecodeError::Shape) };
    let mut batch = EventBatch {
        ts,
        events: Vec::new(),
        data_parallel_rank: None,
        ignored: 0,
        epoch: None,
        heartbeat: None,
    };
    for _ in 0..count {
        match read_event(&mut cursor)? {
            Some(event) => batch.events.push(event),
            None => batch.ignored += 1,
        }
    }
    for field in 2..fields {
        match (field, cursor.value()?) {
            (2, Token::Int(rank)) => batch.data_parallel_rank = u32::try_from(rank).ok(),
            (3, Token::Bin(epoch)) => batch.epoch = epoch.try_into().ok().map(Epoch),
            (4, Token::Int(ms)) => batch.heartbeat = u64::try_from(ms).ok().map(Duration::from_millis),
            _ => {}
        }
    }
    Ok(batch)
}

/// The fields of an event, of whatever type. A field that is not as it should be makes it `odd`.
#[derive(Default)]
struct Fields<'a> {
    kind: Option<&'a [u8]>,
    names: Vec<u64>,
    parent: Option<u64>,
    tokens: Vec<TokenId>,
    block_size: u32,
    medium: Option<&'a [u8]>,
    lora_name: Option<&'a [u8]>,
    /// SGLang's own field.
    cache_salt: Option<&'a [u8]>,
    /// Of the first block: the strings.
    first_extra: Vec<&'a [u8]>,
    group: u32,
    spec_kind: Option<&'a [u8]>,
    odd: bool,
}

fn read_event(cursor: &mut Cursor<'_>) -> Result<Option<ReplicaEvent>, DecodeError> {
    let mut fields = Fields::default();
    match cursor.token()? {
        Token::Map(pairs) => {
            for _ in 0..pairs {
                match cursor.value()? {
                    Token::Str(b"type") => fields.kind = cursor.text()?,
                    Token::Str(key) => fields.read(key, cursor)?,
                    _ => drop(cursor.value()?),
                }
            }
        }
        Token::Array(values @ 1..) => {
            fields.kind = cursor.text()?;
            let names = match fields.kind {
                Some(b"BlockStored") => STORED,
                Some(b"BlockRemoved") => REMOVED,
                _ => &[],
            };
            for n in 0..values as usize - 1 {
                match names.get(n) {
                    Some(name) => fields.read(name.as_bytes(), cursor)?,
                    None => drop(cursor.value()?),
                }
            }
        }
        other => {
            cursor.skip_content(&other)?;
            return Ok(None);
        }
    }
    Ok(fields.into_event())
}

impl<'a> Fields<'a> {
    fn read(&mut self, key: &[u8], cursor: &mut Cursor<'a>) -> Result<(), DecodeError> {
        match key {
            b"block_hashes" => {
                let hash = |token| match token {
                    Token::Int(name) => Some(name as u64),
                    Token::Bin(bytes) => Some(low_u64(bytes)),
                    _ => None,
                };
                self.odd |= !cursor.array(&mut self.names, hash)?;
            }
            b"parent_block_hash" => match cursor.value()? {
                Token::Int(name) => self.parent = Some(name as u64),
                Token::Bin(bytes) => self.parent = Some(low_u64(bytes)),
                other => self.odd |= other != Token::Nil,
            },
            b"token_ids" => {
                let id = |token| match token {
                    Token::Int(id) => TokenId::try_from(id).ok(),
                    _ => None,
                };
                self.odd |= !cursor.array(&mut self.tokens, id)?;
            }
            b"block_size" => match cursor.value()? {
                Token::Int(size) => self.block_size = u32::try_from(size).unwrap_or(0),
                other => self.odd |= other != Token::Nil,
            },
            b"group_idx" => match cursor.value()? {
                Token::Int(group) => self.group = u32::try_from(group).unwrap_or(u32::MAX),
                other => self.odd |= other != Token::Nil,
            },
            b"lora_id" => self.odd |= cursor.value()? != Token::Nil,
            b"lora_name" => self.lora_name = cursor.text()?,
            b"medium" => self.medium = cursor.text()?,
            b"cache_salt" => self.cache_salt = cursor.text()?,
            b"kv_cache_spec_kind" => self.spec_kind = cursor.text()?,
            b"extra_keys" => self.read_extra_keys(cursor)?,
            // The tokens after a block are part of its hash there, and of no hash here.
            b"lookahead_token_ids" => self.odd |= cursor.value()? != Token::Nil,
            _ => drop(cursor.value()?),
        }
        Ok(())
    }

    /// `[[key, …] or nil, …]`, one entry per block.
    fn read_extra_keys(&mut self, cursor: &mut Cursor<'a>) -> Result<(), DecodeError> {
        let blocks = match cursor.token()? {
            Token::Array(blocks) => blocks,
            Token::Nil => return Ok(()),
            other => {
                self.odd = true;
                return cursor.skip_content(&other);
            }
        };
        for block in 0..blocks {
            let keys = match cursor.token()? {
                Token::Array(keys) => keys,
                Token::Nil => continue,
                other => {
                    self.odd = true;
                    cursor.skip_content(&other)?;
                    continue;
                }
            };
            for _ in 0..keys {
                match cursor.value()? {
                    Token::Str(key) if block == 0 => self.first_extra.push(key),
                    // An adapter's name, which is on every block, or an image.
                    _ => self.odd = true,
                }
            }
        }
        Ok(())
    }

    /// `None` where the event says nothing that could be looked up later.
    fn into_event(self) -> Option<ReplicaEvent> {
        if self.kind == Some(b"AllBlocksCleared") {
            return Some(ReplicaEvent::Cleared);
        }
        let medium = match self.medium {
            // Before there were several.
            None => Medium::Device,
            Some(word) => Medium::parse(word)?,
        };
        let (names, group) = (self.names, self.group);
        match self.kind {
            Some(b"BlockRemoved") if !self.odd => Some(ReplicaEvent::Removed { names, medium, group }),
            Some(b"BlockStored") if !self.odd => {
                let expected = names.len().checked_mul(self.block_size as usize)?;
                let fits = self.tokens.is_empty() || (self.block_size > 0 && self.tokens.len() == expected);
                let prefix = self.spec_kind.is_none_or(|kind| PREFIX_KINDS.contains(&kind));
                if !fits || !prefix || self.lora_name.is_some() {
                    return None;
                }
                let salt = match (&self.first_extra[..], self.cache_salt) {
                    ([], salt) => salt,
                    ([salt], _) => Some(*salt),
                    _ => return None,
                };
                let cache_salt = match salt {
                    Some(salt) if self.parent.is_none() => {
                        Some(CacheSalt::new(std::str::from_utf8(salt).ok()?))
                    }
                    // Only SGLang repeats it, in its own field.
                    Some(_) if !self.first_extra.is_empty() => return None,
                    _ => None,
                };
                Some(ReplicaEvent::Stored {
                    names,
                    parent: self.parent,
                    tokens: self.tokens,
                    block_size: self.block_size,
                    cache_salt,
                    medium,
                    group,
                })
            }
            _ => None,
        }
    }
}

/// vLLM's own rule for making an integer of a hash.
fn low_u64(hash: &[u8]) -> u64 {
    hash.iter().fold(0, |low, &byte| low << 8 | u64::from(byte))
}

/// One MessagePack value; of an array or map only how long it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Token<'a> {
    Nil,
    /// Wide enough for both signs of 64 bits: SGLang's hashes are signed, vLLM's are not.
    Int(i128),
    Float(f64),
    Str(&'a [u8]),
    Bin(&'a [u8]),
    Array(u32),
    Map(u32),
    /// Booleans and extensions, which nothing here has.
    Other,
}

pub(super) struct Cursor<'a> {
    pub(super) rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.rest.split_at_checked(bytes).ok_or(DecodeError::MessagePack)?;
        self.rest = rest;
        Ok(taken)
    }

    /// A big-endian unsigned integer of so many bytes.
    fn number(&mut self, bytes: usize) -> Result<u64, DecodeError> {
        Ok(low_u64(self.take(bytes)?))
    }

    pub(super) fn token(&mut self) -> Result<Token<'a>, DecodeError> {
        let marker = Marker::from_u8(self.take(1)?[0]);
        Ok(match marker {
            Marker::Null => Token::Nil,
            Marker::FixPos(n) => Token::Int(n.into()),
            Marker::FixNeg(n) => Token::Int(n.into()),
            Marker::U8 => Token::Int(self.number(1)?.into()),
            Marker::U16 => Token::Int(self.number(2)?.into()),
            Marker::U32 => Token::Int(self.number(4)?.into()),
            Marker::U64 => Token::Int(self.number(8)?.into()),
            Marker::I8 => Token::Int((self.number(1)? as i8).into()),
            Marker::I16 => Token::Int((self.number(2)? as i16).into()),
            Marker::I32 => Token::Int((self.number(4)? as i32).into()),
            Marker::I64 => Token::Int((self.number(8)? as i64).into()),
            Marker::F32 => Token::Float(f32::from_bits(self.number(4)? as u32).into()),
            Marker::F64 => Token::Float(f64::from_bits(self.number(8)?)),
            Marker::FixStr(n) => Token::Str(self.take(n.into())?),
            Marker::Str8 => Token::Str(self.sized(1)?),
            Marker::Str16 => Token::Str(self.sized(2)?),
            Marker::Str32 => Token::Str(self.sized(4)?),
            Marker::Bin8 => Token::Bin(self.sized(1)?),
            Marker::Bin16 => Token::Bin(self.sized(2)?),
            Marker::Bin32 => Token::Bin(self.sized(4)?),
            Marker::FixArray(n) => Token::Array(n.into()),
            Marker::Array16 => Token::Array(self.number(2)? as u32),
            Marker::Array32 => Token::Array(self.number(4)? as u32),
            Marker::FixMap(n) => Token::Map(n.into()),
            Marker::Map16 => Token::Map(self.number(2)? as u32),
            Marker::Map32 => Token::Map(self.number(4)? as u32),
            Marker::True | Marker::False => Token::Other,
            Marker::FixExt1 => self.ext(1)?,
            Marker::FixExt2 => self.ext(2)?,
            Marker::FixExt4 => self.ext(4)?,
            Marker::FixExt8 => self.ext(8)?,
            Marker::FixExt16 => self.ext(16)?,
            Marker::Ext8 => self.sized_ext(1)?,
            Marker::Ext16 => self.sized_ext(2)?,
            Marker::Ext32 => self.sized_ext(4)?,
            Marker::Reserved => return Err(DecodeError::MessagePack),
        })
    }

    /// Bytes after their length, which is a number of so many bytes.
    fn sized(&mut self, length_bytes: usize) -> Result<&'a [u8], DecodeError> {
        let length = self.number(length_bytes)?;
        self.take(usize::try_from(length).map_err(|_| DecodeError::MessagePack)?)
    }

    fn ext(&mut self, bytes: usize) -> Result<Token<'a>, DecodeError> {
        self.take(1 + bytes)?;
        Ok(Token::Other)
    }

    fn sized_ext(&mut self, length_bytes: usize) -> Result<Token<'a>, DecodeError> {
        let length = self.number(length_bytes)?;
        self.ext(usize::try_from(length).map_err(|_| DecodeError::MessagePack)?)
    }

    /// One whole value; the content of an array or map is skipped.
    pub(super) fn value(&mut self) -> Result<Token<'a>, DecodeError> {
        let token = self.token()?;
        self.skip_content(&token)?;
        Ok(token)
    }

    /// A string; `None` for anything else.
    fn text(&mut self) -> Result<Option<&'a [u8]>, DecodeError> {
        Ok(match self.value()? {
            Token::Str(text) => Some(text),
            _ => None,
        })
    }

    /// Counts what is left instead of recursing: nesting costs no stack.
    fn skip_content(&mut self, token: &Token<'a>) -> Result<(), DecodeError> {
        let inside = |token: &Token<'_>| match *token {
            Token::Array(n) => u64::from(n),
            Token::Map(n) => 2 * u64::from(n),
            _ => 0,
        };
        let mut left = inside(token);
        while left > 0 {
            // Each one takes at least a byte, so this ends with the payload, and the sum can't overflow.
            left = left - 1 + inside(&self.token()?);
        }
        Ok(())
    }

    /// An array of values that `read` takes, or nil. False where there was anything else, which is skipped.
    fn array<T>(
        &mut self,
        out: &mut Vec<T>,
        read: impl Fn(Token<'a>) -> Option<T>,
    ) -> Result<bool, DecodeError> {
        let count = match self.token()? {
            Token::Array(count) => count as usize,
            Token::Nil => return Ok(true),
            other => return self.skip_content(&other).map(|()| false),
        };
        out.clear();
        out.reserve(count.min(RESERVED_MAX));
        let mut all = true;
        for _ in 0..count {
            match read(self.value()?) {
                Some(value) => out.push(value),
                None => all = false,
            }
        }
        Ok(all)
    }
}
