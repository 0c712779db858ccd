//! A replica's load as it pushes it: SGLang's `LoadStat`, a MessagePack array that begins with its name.
//!
//! Format: SGLang 0.5.23 `managers/scheduler_components/load_publisher.py`, frames `["load", number, payload]`.

use rmp::encode::{write_array_len, write_str, write_uint};

use super::decode::{Cursor, DecodeError, Token};
use super::encode::Put;

/// First frame of a load report.
pub const LOAD_TOPIC: &str = "load";

/// What a replica has to do, now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LoadStat {
    pub running_requests: u64,
    pub waiting_requests: u64,
    /// Tokens of KV cache that running requests hold.
    pub kv_tokens_used: u64,
    /// Tokens of KV cache that there are; 0 where that is not known.
    pub kv_tokens: u64,
    pub data_parallel_rank: u64,
    /// Prompt tokens that wait to be computed.
    pub waiting_uncached_tokens: u64,
    /// Tokens held and tokens waiting together.
    pub total_tokens: u64,
    /// Requests that run at the same time at most.
    pub running_requests_max: u64,
    /// Prompt tokens computed since the start.
    pub prefill_tokens_total: u64,
    /// Microseconds since the start in which prompt tokens were computed.
    pub prefill_busy_us_total: u64,
}

/// Fields of the first version; later ones are appended.
const FIELDS_MIN: u32 = 4;

pub fn encode_load(load: &LoadStat, out: &mut Vec<u8>) {
    let mut load = *load;
    let mut put = || -> Put {
        write_array_len(out, 11)?;
        write_str(out, "LoadStat")?;
        for field in fields(&mut load) {
            write_uint(out, *field)?;
        }
        Ok(())
    };
    put().expect("writing to memory does not fail");
}

/// Reads one report. `None` in a field counts as 0, and so does one that an older version does not have.
pub fn decode_load(payload: &[u8]) -> Result<LoadStat, DecodeError> {
    let mut cursor = Cursor { rest: payload };
    let Token::Array(count) = cursor.token()? else { return Err(DecodeError::Load) };
    if count <= FIELDS_MIN || cursor.value()? != Token::Str(b"LoadStat") {
        return Err(DecodeError::Load);
    }
    let mut load = LoadStat::default();
    for field in fields(&mut load).into_iter().take(count as usize - 1) {
        match cursor.value()? {
            Token::Int(value) => *field = u64::try_from(value).map_err(|_| DecodeError::Load)?,
            Token::Nil => {}
            _ => return Err(DecodeError::Load),
        }
    }
    Ok(load)
}

/// In the order of the wire.
fn fields(load: &mut LoadStat) -> [&mut u64; 10] {
    [
        &mut load.running_requests,
        &mut load.waiting_requests,
        &mut load.kv_tokens_used,
        &mut load.kv_tokens,
        &mut load.data_parallel_rank,
        &mut load.waiting_uncached_tokens,
        &mut load.total_tokens,
        &mut load.running_requests_max,
        &mut load.prefill_tokens_total,
        &mut load.prefill_busy_us_total,
    ]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What msgspec writes for SGLang's class.
    const SGLANG: [u8; 38] = [
        0x9b, 0xa8, b'L', b'o', b'a', b'd', b'S', b't', b'a', b't', 3, 2, 0xcd, 0x03, 0xe8, 0xce, 0, 7, 0xa1,
        0x20, 1, 0xcd, 0x10, 0, 0xcd, 0x13, 0xe8, 0x40, 0xce, 7, 0x5b, 0xcd, 0x15, 0xce, 0x3a, 0xde, 0x68,
        0xb1,
    ];

    #[test]
    fn what_sglang_writes() {
        let load = LoadStat {
            running_requests: 3,
            waiting_requests: 2,
            kv_tokens_used: 1000,
            kv_tokens: 500_000,
            data_parallel_rank: 1,
            waiting_uncached_tokens: 4096,
            total_tokens: 5096,
            running_requests_max: 64,
            prefill_tokens_total: 123_456_789,
            prefill_busy_us_total: 987_654_321,
        };
        assert_eq!(decode_load(&SGLANG), Ok(load));
        let mut out = Vec::new();
        encode_load(&load, &mut out);
        assert_eq!(out, SGLANG);

        // A later version with one field more, and the first one with `None` as its last.
        let mut longer = SGLANG.to_vec();
        longer[0] = 0x9c;
        longer.push(0xc0);
        assert_eq!(decode_load(&longer), Ok(load));
        let mut first = SGLANG[..20].to_vec();
        first[0] = 0x96;
        first.push(0xc0);
        let expect = LoadStat {
            running_requests: 3,
            waiting_requests: 2,
            kv_tokens_used: 1000,
            kv_tokens: 500_000,
            ..LoadStat::default()
        };
        assert_eq!(decode_load(&first), Ok(expect));
    }

    #[test]
    fn what_is_no_report() {
        let check = |change: fn(&mut Vec<u8>), expect: DecodeError| {
            let mut payload = SGLANG.to_vec();
            change(&mut payload);
            assert_eq!(decode_load(&payload), Err(expect));
        };
        check(Vec::clear, DecodeError::MessagePack);
        check(|payload| payload.truncate(30), DecodeError::MessagePack);
        check(|payload| payload[0] = 0x94, DecodeError::Load);
        check(|payload| payload[2] = b'R', DecodeError::Load);
        check(|payload| payload[10] = 0xff, DecodeError::Load);
        check(|payload| payload[0] = 1, DecodeError::Load);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(payload in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = decode_load(&payload);
        }
    }
}
