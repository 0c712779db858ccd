//! Load reports of another process: any payload is refused or read, and what is read is written as it was.
#![no_main]

use forebay_kv::codec::{decode_load, encode_load};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|payload: &[u8]| {
    let Ok(load) = decode_load(payload) else { return };
    let mut again = Vec::new();
    encode_load(&load, &mut again);
    assert_eq!(decode_load(&again), Ok(load));
});
