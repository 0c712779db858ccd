use bytes::Bytes;
use proptest::prelude::*;
use tokio::io::{AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split};

use super::*;

const LIMITS: Limits = Limits { message_bytes_max: 1000, parts_max: 4 };

type Ends = (Reader<ReadHalf<DuplexStream>>, Writer<WriteHalf<DuplexStream>>);

async fn pair(a: SocketType, b: SocketType) -> (Result<Ends, ZmtpError>, Result<Ends, ZmtpError>) {
    // Just wide enough for a greeting, which both sides send first; longer messages arrive in pieces.
    let (left, right) = duplex(128);
    let ((lr, lw), (rr, rw)) = (split(left), split(right));
    tokio::join!(handshake(lr, lw, a, LIMITS), handshake(rr, rw, b, LIMITS))
}

/// One of our readers with a peer that is scripted byte by byte.
async fn against(bytes: &[u8]) -> Result<Vec<Message>, ZmtpError> {
    let (ours, theirs) = duplex(1 << 16);
    let (read, write) = split(ours);
    let (_their_read, mut their_write) = split(theirs);
    their_write.write_all(bytes).await.expect("room");
    their_write.shutdown().await.expect("open");
    let (mut reader, _writer) = handshake(read, write, SocketType::Pub, LIMITS).await?;
    let mut messages = Vec::new();
    loop {
        match reader.recv().await {
            Ok(message) => messages.push(message),
            Err(ZmtpError::Closed) => return Ok(messages),
            Err(error) => return Err(error),
        }
    }
}

/// What libzmq 4.3 sends when a SUB socket connects: version 3.1, and READY with its type.
fn libzmq_sub() -> Vec<u8> {
    let mut bytes = vec![0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 1];
    bytes.extend(b"NULL");
    bytes.resize(64, 0);
    bytes.extend(b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB");
    bytes
}

#[tokio::test]
async fn messages_come_as_they_were_sent() {
    let (sub, publisher) = pair(SocketType::Sub, SocketType::Pub).await;
    let ((mut sub_in, mut sub_out), (mut pub_in, mut pub_out)) = (sub.expect("sub"), publisher.expect("pub"));
    let long: Bytes = vec![7u8; 700].into();
    let sent = [vec![subscribe(b"kv@")], vec![Bytes::new(), "x".into(), long]];
    let sending = async {
        for message in &sent {
            sub_out.send(message).await.expect("sent");
        }
        pub_out.send(&sent[1]).await.expect("sent");
    };
    let receiving = async {
        assert_eq!(pub_in.recv().await.expect("subscribed"), [&b"\x01kv@"[..]]);
        assert_eq!(pub_in.recv().await.expect("a message"), sent[1]);
        assert_eq!(sub_in.recv().await.expect("a message"), sent[1]);
    };
    tokio::join!(sending, receiving);
    drop((sub_in, sub_out));
    assert!(matches!(pub_in.recv().await, Err(ZmtpError::Closed)));
}

#[tokio::test]
async fn only_types_that_fit() {
    for (a, b, fits) in [
        (SocketType::Sub, SocketType::Pub, true),
        (SocketType::Dealer, SocketType::Router, true),
        (SocketType::Dealer, SocketType::Pub, false),
        (SocketType::Sub, SocketType::Sub, false),
    ] {
        let (left, right) = pair(a, b).await;
        if fits {
            assert!(left.is_ok() && right.is_ok(), "{a:?} {b:?}");
        } else {
            assert!(matches!(left, Err(ZmtpError::SocketType)), "{a:?} {b:?}");
        }
    }
}

#[tokio::test]
async fn a_peer_byte_by_byte() {
    let check = async |more: &[u8], expect: Result<&[&[&[u8]]], &str>| {
        let got = against(&[&libzmq_sub()[..], more].concat()).await;
        let got = got.map_err(|error| error.to_string());
        match (&got, expect) {
            (Ok(got), Ok(expect)) => {
                let got: Vec<Vec<&[u8]>> = got.iter().map(|m| m.iter().map(|p| &p[..]).collect()).collect();
                assert_eq!(got, expect, "{more:x?}");
            }
            (Err(got), Err(expect)) => assert!(got.contains(expect), "{more:x?}: {got}"),
            _ => panic!("{more:x?}: {got:?}, not {expect:?}"),
        }
    };
    check(b"", Ok(&[])).await;
    check(b"\x00\x04\x01kv@", Ok(&[&[b"\x01kv@"]])).await;
    // The same as commands, with a heartbeat between.
    check(b"\x04\x0c\x09SUBSCRIBEkv\x04\x07\x04PING\0\0\x04\x07\x06CANCEL", Ok(&[&[b"\x01kv"], &[b"\x00"]]))
        .await;
    check(b"\x01\x00\x01\x01a\x00\x01b", Ok(&[&[b"", b"a", b"b"]])).await;
    // The long form of a short length.
    check(b"\x02\0\0\0\0\0\0\0\x01a", Ok(&[&[b"a"]])).await;
    check(b"\x02\x7f\xff\xff\xff\xff\xff\xff\xff", Err("over the limit")).await;
    check(b"\x02\0\0\0\0\0\0\x03\xe9", Err("over the limit")).await;
    check(b"\x06\0\0\0\0\0\0\xff\xff", Err("over the limit")).await;
    check(b"\x01\0\x01\0\x01\0\x01\0\x00\0", Err("over the limit")).await;
    // The limit is on the whole message.
    check(&[&b"\x01\xff"[..], &[0; 255], b"\x02\0\0\0\0\0\0\x02\xea"].concat(), Err("over the limit")).await;
    check(b"\x08\0", Err("breaks the protocol")).await;
    check(b"\x05\0", Err("breaks the protocol")).await;
}

#[tokio::test]
async fn greetings_that_are_none() {
    let check = async |change: fn(&mut Vec<u8>), expect: &str| {
        let mut bytes = libzmq_sub();
        change(&mut bytes);
        let error = against(&bytes).await.expect_err("refused").to_string();
        assert!(error.contains(expect), "{error}");
    };
    check(|bytes| *bytes = b"GET / HTTP/1.1\r\n\r\n".to_vec(), "does not speak ZMTP").await;
    check(|bytes| bytes[10] = 1, "does not speak ZMTP").await;
    check(|bytes| bytes[12..17].copy_from_slice(b"CURVE"), "mechanism").await;
    check(|bytes| bytes.truncate(70), "closed").await;
    check(|bytes| bytes[66..72].copy_from_slice(b"\x05ERROR"), "refused").await;
    check(|bytes| bytes[66..72].copy_from_slice(b"\x05HELLO"), "breaks the protocol").await;
    check(|bytes| bytes[72] = 200, "breaks the protocol").await;
    check(|bytes| bytes.truncate(64), "closed").await;
}

/// A reader that is asked, dropped and asked again loses nothing.
#[tokio::test(start_paused = true)]
async fn receiving_can_be_interrupted() {
    let (sub, publisher) = pair(SocketType::Sub, SocketType::Pub).await;
    let ((mut sub_in, _sub_out), (_pub_in, mut pub_out)) = (sub.expect("sub"), publisher.expect("pub"));
    let message: Message = vec![vec![1u8; 300].into(), vec![2u8; 300].into()];
    let sending = pub_out.send(&message);
    let receiving = async {
        loop {
            // As in a `select!` where another branch is always ready.
            match poll_once(sub_in.recv()).await {
                Some(got) => return got.expect("a message"),
                None => tokio::task::yield_now().await,
            }
        }
    };
    let (sent, got) = tokio::join!(sending, receiving);
    sent.expect("sent");
    assert_eq!(got, message);
}

/// Polls once.
async fn poll_once<T>(future: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(std::time::Duration::ZERO, future).await.ok()
}

proptest! {
    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200), greeted in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let bytes = if greeted { [libzmq_sub(), bytes].concat() } else { bytes };
        let _ = runtime.block_on(against(&bytes));
    }
}
