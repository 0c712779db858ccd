use forebay_types::BlockHash;
use proptest::prelude::*;

use super::*;
use crate::{BlockHasher, KvEvent};

fn stored(names: &[u64], parent: Option<u64>, tokens: Vec<TokenId>) -> ReplicaEvent {
    ReplicaEvent::Stored {
        names: names.to_vec(),
        parent,
        block_size: (tokens.len() / names.len().max(1)) as u32,
        tokens,
        cache_salt: None,
        medium: Medium::Device,
        group: 0,
    }
}

fn removed(names: &[u64]) -> ReplicaEvent {
    ReplicaEvent::Removed { names: names.to_vec(), medium: Medium::Device, group: 0 }
}

/// `msgpack.packb` as hexadecimal digits; spaces are for the reader.
fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u32> = hex.chars().filter_map(|digit| digit.to_digit(16)).collect();
    digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect()
}

/// A batch at 1.5 s of rank 0 with one event.
fn batch_of(event: &[u8]) -> Vec<u8> {
    [&bytes("93 cb3ff8000000000000 91")[..], event, &[0]].concat()
}

/// MessagePack of a JSON value; `{"bin": [..]}` is bytes.
mod pack {
    pub(super) fn text(text: &str) -> Vec<u8> {
        let mut out = Vec::new();
        rmp::encode::write_str(&mut out, text).expect("to memory");
        out
    }

    pub(super) fn int(value: i64) -> Vec<u8> {
        let mut out = Vec::new();
        rmp::encode::write_sint(&mut out, value).expect("to memory");
        out
    }

    pub(super) fn bin(value: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        rmp::encode::write_bin(&mut out, value).expect("to memory");
        out
    }

    pub(super) fn nil() -> Vec<u8> {
        vec![0xc0]
    }

    pub(super) fn array(items: &[Vec<u8>]) -> Vec<u8> {
        let mut out = Vec::new();
        rmp::encode::write_array_len(&mut out, items.len() as u32).expect("to memory");
        out.extend(items.concat());
        out
    }

    pub(super) fn map(items: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut out = Vec::new();
        rmp::encode::write_map_len(&mut out, items.len() as u32).expect("to memory");
        for (key, value) in items {
            out.extend(text(key));
            out.extend(value);
        }
        out
    }
}

use pack::{array, bin, int, map, nil, text};

fn ints(values: &[i64]) -> Vec<u8> {
    array(&values.iter().map(|&value| int(value)).collect::<Vec<_>>())
}

fn one(event: &[u8]) -> Option<ReplicaEvent> {
    let batch = decode_batch(&batch_of(event)).expect("a batch");
    assert_eq!(batch.events.len() as u32 + batch.ignored, 1);
    batch.events.into_iter().next()
}

/// Bytes that msgspec 0.22 writes for vLLM's own classes.
#[test]
fn what_msgspec_writes() {
    let payload = bytes(
        "93 cb3ff8000000000000 93 \
         88 a474797065 ab426c6f636b53746f726564 ac626c6f636b5f686173686573 92 cf ffffffffffffffff 07 \
         b1706172656e745f626c6f636b5f68617368 c0 a9746f6b656e5f696473 94 01 02 cd0100 ce00012345 \
         aa626c6f636b5f73697a65 02 a76c6f72615f6964 c0 a66d656469756d a3475055 a96c6f72615f6e616d65 c0 \
         83 a474797065 ac426c6f636b52656d6f766564 ac626c6f636b5f686173686573 91 07 a66d656469756d a3475055 \
         81 a474797065 b0416c6c426c6f636b73436c6561726564 \
         03",
    );
    let expect = EventBatch {
        ts: 1.5,
        events: vec![
            stored(&[u64::MAX, 7], None, vec![1, 2, 256, 0x12345]),
            removed(&[7]),
            ReplicaEvent::Cleared,
        ],
        data_parallel_rank: Some(3),
        ignored: 0,
        epoch: None,
        heartbeat: None,
    };
    assert_eq!(decode_batch(&payload[..]), Ok(expect));
}

#[test]
fn arrays_of_older_versions() {
    let check = |event: Vec<u8>, expect: Option<ReplicaEvent>| assert_eq!(one(&event), expect);
    let head = |hash: Vec<u8>, parent: Vec<u8>| {
        vec![text("BlockStored"), array(&[hash]), parent, ints(&[1, 2]), int(2), nil()]
    };
    check(array(&head(int(7), nil())), Some(stored(&[7], None, vec![1, 2])));
    // Raw hashes, of which the last 8 bytes count.
    let mut digest = [9u8; 32];
    digest[24..].copy_from_slice(&5u64.to_be_bytes());
    check(array(&head(bin(&digest), int(3))), Some(stored(&[5], Some(3), vec![1, 2])));
    // A newer one in the old shape.
    let newer = |kind: &str| {
        let tail = [text("GPU"), nil(), array(&[nil()]), int(1), text(kind), nil()];
        array(&[head(int(7), nil()), tail.to_vec()].concat())
    };
    let Some(ReplicaEvent::Stored { group, .. }) = one(&newer("full_attention")) else { panic!("stored") };
    assert_eq!(group, 1);
    check(newer("sliding_window"), None);
    check(array(&[text("BlockRemoved"), ints(&[7])]), Some(removed(&[7])));
    check(array(&[text("BlockRemoved"), ints(&[7]), text("GPU")]), Some(removed(&[7])));
    check(array(&[text("AllBlocksCleared")]), Some(ReplicaEvent::Cleared));
    check(array(&[text("BlockPainted"), ints(&[7])]), None);
}

#[test]
fn what_can_not_be_looked_up_is_ignored_and_what_is_new_is_read_over() {
    let with = |more: &[(&str, Vec<u8>)]| {
        let mut fields = vec![
            ("block_hashes", ints(&[7])),
            ("parent_block_hash", nil()),
            ("token_ids", ints(&[1, 2])),
            ("block_size", int(2)),
            // Not first, as it is with another encoder.
            ("type", text("BlockStored")),
        ];
        for (key, value) in more {
            fields.retain(|(known, _)| known != key);
            fields.push((key, value.clone()));
        }
        one(&map(&fields))
    };
    let plain = Some(stored(&[7], None, vec![1, 2]));
    assert_eq!(with(&[]), plain);
    assert_eq!(with(&[("extra_keys", nil()), ("locality", text("LOCAL"))]), plain);
    assert_eq!(with(&[("new", map(&[("deep", array(&[array(&[int(1)]), bin(b"x")]))]))]), plain);
    // SGLang's hashes are signed.
    assert_eq!(with(&[("block_hashes", ints(&[-1]))]), Some(stored(&[u64::MAX], None, vec![1, 2])));

    for unusable in [
        ("medium", text("SHARED")),
        ("lora_name", text("a")),
        ("lora_id", int(1)),
        ("kv_cache_spec_kind", text("mamba")),
        ("block_size", int(3)),
        ("block_size", int(0)),
        ("token_ids", array(&[ints(&[1, 2]), ints(&[2, 3])])),
        ("token_ids", ints(&[-1, 2])),
        ("token_ids", text("no")),
        ("block_hashes", text("no")),
        ("lookahead_token_ids", array(&[ints(&[3])])),
        ("extra_keys", array(&[array(&[array(&[text("image"), int(0)])])])),
        ("extra_keys", array(&[nil(), array(&[text("adapter")])])),
        ("type", text("BlockPainted")),
    ] {
        assert_eq!(with(std::slice::from_ref(&unusable)), None, "{}", unusable.0);
    }

    let salted = |more: &[(&str, Vec<u8>)]| match with(more) {
        Some(ReplicaEvent::Stored { cache_salt, .. }) => cache_salt.map(|salt| salt.expose().to_owned()),
        other => panic!("{other:?}"),
    };
    assert_eq!(salted(&[("extra_keys", array(&[array(&[text("s")])]))]), Some("s".to_owned()));
    assert_eq!(salted(&[("cache_salt", text("s"))]), Some("s".to_owned()));
    assert_eq!(salted(&[("cache_salt", text("s")), ("parent_block_hash", int(3))]), None);

    let Some(ReplicaEvent::Stored { medium, tokens, .. }) =
        with(&[("medium", text("CPU")), ("token_ids", ints(&[])), ("block_size", int(0))])
    else {
        panic!("a copy to the host")
    };
    assert_eq!((medium, tokens.len()), (Medium::Host, 0));
}

#[test]
fn what_is_no_batch() {
    let check = |payload: &[u8], expect: DecodeError| assert_eq!(decode_batch(payload), Err(expect));
    check(&[], DecodeError::MessagePack);
    check(&text("no"), DecodeError::Shape);
    check(&array(&[nil(), array(&[])]), DecodeError::Shape);
    check(&array(&[int(1)]), DecodeError::Shape);
    check(&array(&[int(1), nil()]), DecodeError::Shape);
    check(&vec![0; BATCH_BYTES_MAX + 1], DecodeError::TooLarge { bytes: BATCH_BYTES_MAX + 1 });
    // Lengths are not believed.
    check(&bytes("92 00 dd ffffffff"), DecodeError::MessagePack);
    check(&bytes("92 00 91 81 a9 746f6b656e5f696473 dd ffffffff"), DecodeError::MessagePack);
    // Nesting costs no stack.
    let deep = [bytes("93 00 90"), vec![0x91; 1 << 20]].concat();
    check(&deep, DecodeError::MessagePack);
}

fn arb_event() -> impl Strategy<Value = KvEvent> {
    let hash = prop::array::uniform32(any::<u8>()).prop_map(BlockHash);
    let hashes = prop::collection::vec(hash, 1..20);
    prop_oneof![
        5 => (hashes.clone(), prop::option::of(prop::array::uniform32(any::<u8>())), 1u32..5, any::<u32>(), any::<bool>())
            .prop_map(|(hashes, parent, block_size, seed, salted)| KvEvent::Stored {
                tokens: (0..hashes.len() as u32 * block_size).map(|n| n.wrapping_mul(seed)).collect(),
                cache_salt: (salted && parent.is_none()).then(|| CacheSalt::new("a salt")),
                parent: parent.map(BlockHash),
                hashes,
                block_size,
            }),
        2 => hashes.prop_map(|hashes| KvEvent::Removed { hashes }),
        1 => Just(KvEvent::Cleared),
    ]
}

fn as_reported(event: &KvEvent) -> ReplicaEvent {
    let names = |hashes: &[BlockHash]| hashes.iter().map(BlockHash::low_u64).collect();
    match event {
        KvEvent::Stored { hashes, parent, tokens, block_size, cache_salt } => ReplicaEvent::Stored {
            names: names(hashes),
            parent: parent.as_ref().map(BlockHash::low_u64),
            tokens: tokens.clone(),
            block_size: *block_size,
            cache_salt: cache_salt.clone(),
            medium: Medium::Device,
            group: 0,
        },
        KvEvent::Removed { hashes } => {
            ReplicaEvent::Removed { names: names(hashes), medium: Medium::Device, group: 0 }
        }
        KvEvent::Cleared => ReplicaEvent::Cleared,
    }
}

proptest! {
    #[test]
    fn what_we_write_we_read(ts in 0f64..4e9, events in prop::collection::vec(arb_event(), 0..8), rank in any::<u32>()) {
        let mut payload = Vec::new();
        encode_batch(ts, &events, rank, &mut payload);
        let expect = EventBatch {
            ts,
            events: events.iter().map(as_reported).collect(),
            data_parallel_rank: Some(rank),
            ignored: 0,
            epoch: None,
            heartbeat: None,
        };
        prop_assert_eq!(decode_batch(&payload), Ok(expect));
    }

    #[test]
    fn any_bytes_are_survived(payload in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode_batch(&payload);
        let _ = decode_batch(&batch_of(&payload));
    }

    /// What is almost right goes deeper than noise.
    #[test]
    fn damaged_batches_are_survived(
        events in prop::collection::vec(arb_event(), 1..4),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut payload = Vec::new();
        encode_batch(1.0, &events, 0, &mut payload);
        prop_assert_eq!(decode_batch(&payload[..cut.index(payload.len())]).is_err(), true);
        for (at, byte) in damage {
            let at = at.index(payload.len());
            payload[at] = byte;
        }
        let _ = decode_batch(&payload);
    }
}

/// From one of our caches over the wire into another process's index.
#[test]
fn a_chain_survives_the_wire() {
    let mut hasher = BlockHasher::new(16, Some(CacheSalt::new("s")));
    hasher.extend(&(0..64).collect::<Vec<_>>());
    let event = KvEvent::Stored {
        hashes: hasher.hashes().to_vec(),
        parent: None,
        tokens: (0..64).collect(),
        block_size: 16,
        cache_salt: Some(CacheSalt::new("s")),
    };
    let mut payload = Vec::new();
    encode_batch(0.0, std::slice::from_ref(&event), 0, &mut payload);
    let batch = decode_batch(&payload).expect("a batch");
    assert_eq!(crate::Renamer::new(16, 100).rename(&batch.events[0]), Some(event));
}
