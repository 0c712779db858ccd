use forebay_types::BlockHash;

use super::*;
use crate::codec::decode_batch;

const EPOCH: Epoch = Epoch([7; 16]);

fn stored(n: u8) -> KvEvent {
    KvEvent::Stored {
        hashes: vec![BlockHash([n; 32])],
        parent: None,
        tokens: vec![n.into(); 4],
        block_size: 4,
        cache_salt: None,
    }
}

#[test]
fn keeps_the_last_batches() {
    let mut publication = Publication::new(EPOCH, 3);
    let seqs = |publication: &Publication, start| {
        publication.since(start).into_iter().map(|(seq, _)| seq).collect::<Vec<_>>()
    };
    assert_eq!(seqs(&publication, 0), [0u64; 0]);
    for seq in 0..5 {
        let (number, payload) = publication.on_step(1.0, [stored(seq)]).expect("something to tell");
        assert_eq!(number, u64::from(seq));
        assert_eq!(publication.since(number), [(number, payload)]);
    }
    assert_eq!(seqs(&publication, 0), [2, 3, 4]);
    assert_eq!(seqs(&publication, 3), [3, 4]);
    assert_eq!(seqs(&publication, 5), [0u64; 0]);
    assert_eq!(seqs(&publication, u64::MAX), [0u64; 0]);
    // What is asked for by `snapshot` as by a number.
    assert_eq!(seqs(&publication, u64::from_be_bytes(*crate::codec::SNAPSHOT_REQUEST)), [0u64; 0]);
}

#[test]
fn is_limited_in_bytes() {
    let mut publication = Publication::new(EPOCH, 1000);
    let large: Bytes = vec![0; BYTES_MAX / 2].into();
    for _ in 0..3 {
        publication.push(large.clone());
    }
    assert_eq!(publication.since(0).len(), 2);
    // What is larger than all of it is sent, but not kept.
    assert_eq!(publication.push(vec![0; BYTES_MAX + 1].into()), 3);
    assert_eq!(publication.since(0).len(), 0);
    assert_eq!(publication.push(Bytes::new()), 4);
    assert_eq!(publication.since(0), [(4, Bytes::new())]);
}

#[test]
fn replay_can_be_turned_off() {
    let mut publication = Publication::new(EPOCH, 0);
    assert_eq!((publication.push(Bytes::new()), publication.push(Bytes::new())), (0, 1));
    assert!(publication.since(0).is_empty());
    assert_eq!(publication.next_seq(), 2);
}

#[test]
fn what_means_nothing_is_no_batch() {
    let mut publication = Publication::new(EPOCH, 10);
    assert_eq!(publication.on_step(1.0, []), None);
    assert_eq!(publication.on_step(1.0, [KvEvent::Removed { hashes: vec![BlockHash([1; 32])] }]), None);
    assert_eq!(publication.next_seq(), 0);
    assert!(publication.on_step(1.0, [KvEvent::Cleared]).is_some());
}

#[test]
fn heartbeats_and_snapshots_say_whose_they_are() {
    let mut publication = Publication::new(EPOCH, 0);
    publication.on_step(1.0, (0..3).map(stored));
    let beat = decode_batch(&publication.heartbeat(2.5, Duration::from_millis(1500))).expect("a batch");
    assert_eq!((beat.ts, beat.events.len(), beat.data_parallel_rank), (2.5, 0, Some(0)));
    assert_eq!((beat.epoch, beat.heartbeat), (Some(EPOCH), Some(Duration::from_millis(1500))));

    let snapshot = publication.snapshot();
    publication.on_step(1.0, [KvEvent::Cleared]);
    assert_eq!(snapshot.next_seq(), 1);
    let batches: Vec<_> =
        snapshot.into_payloads(3.0).map(|payload| decode_batch(&payload).expect("a batch")).collect();
    assert!(batches.iter().all(|batch| batch.epoch == Some(EPOCH) && batch.heartbeat.is_none()));
    assert_eq!(batches[0].events, [crate::codec::ReplicaEvent::Cleared]);
    assert_eq!((batches.len(), batches[1].events.len()), (2, 3));
    assert_eq!(publication.snapshot().into_payloads(3.0).count(), 1);
}
