//! One connection: greeting, handshake, messages.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The parts of a message, in order; never empty.
pub type Message = Vec<Bytes>;

/// What a socket is to its peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketType {
    Pub,
    Sub,
    Router,
    Dealer,
}

impl SocketType {
    fn name(self) -> &'static [u8] {
        match self {
            Self::Pub => b"PUB",
            Self::Sub => b"SUB",
            Self::Router => b"ROUTER",
            Self::Dealer => b"DEALER",
        }
    }

    /// The types that may be at the other end.
    fn peers(self) -> &'static [&'static [u8]] {
        match self {
            Self::Pub => &[b"SUB", b"XSUB"],
            Self::Sub => &[b"PUB", b"XPUB"],
            Self::Router => &[b"REQ", b"DEALER", b"ROUTER"],
            Self::Dealer => &[b"REP", b"DEALER", b"ROUTER"],
        }
    }
}

/// What is taken from a peer.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub message_bytes_max: usize,
    pub parts_max: usize,
}

/// Why a connection came to its end.
#[derive(Debug, thiserror::Error)]
pub enum ZmtpError {
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error("the peer closed the connection")]
    Closed,
    #[error("the peer does not speak ZMTP 3")]
    NotZmtp,
    #[error("the peer asks for a security mechanism; only connections without one are supported")]
    Mechanism,
    #[error("the peer's socket type does not fit")]
    SocketType,
    #[error("the peer refused the connection")]
    Refused,
    #[error("a message of the peer is over the limit of {bytes_max} bytes in {parts_max} parts")]
    TooLarge { bytes_max: usize, parts_max: usize },
    #[error("the peer breaks the protocol")]
    Protocol,
}

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

const GREETING_BYTES: usize = 64;
/// Commands are names and addresses.
const COMMAND_BYTES_MAX: usize = 4096;
const READ_BYTES: usize = 16 << 10;

/// Version 3.0 and the mechanism NULL, as neither server nor client.
///
/// 3.0 although 3.1 exists: peers then send subscriptions as messages, which all of them understand, and no heartbeats.
fn greeting() -> [u8; GREETING_BYTES] {
    let mut greeting = [0; GREETING_BYTES];
    // The padding is 8 bytes that older versions read as a length; libzmq writes 1 into it.
    greeting[..12].copy_from_slice(&[0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 0]);
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}

/// Opens a connection on a fresh stream. The caller sets a time limit.
///
/// Cancellation: the stream is lost.
pub async fn handshake<R, W>(
    read: R,
    write: W,
    socket: SocketType,
    limits: Limits,
) -> Result<(Reader<R>, Writer<W>), ZmtpError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut reader =
        Reader { read, buffer: BytesMut::new(), message: Message::new(), message_bytes: 0, limits };
    let mut writer = Writer { write, out: BytesMut::new() };

    writer.out.put_slice(&greeting());
    let mut ready = BytesMut::new();
    ready.put_slice(b"\x05READY");
    put_property(&mut ready, b"Socket-Type", socket.name());
    if matches!(socket, SocketType::Router | SocketType::Dealer) {
        put_property(&mut ready, b"Identity", b"");
    }
    put_frame(&mut writer.out, COMMAND, &ready);
    writer.flush().await?;

    while reader.buffer.len() < GREETING_BYTES {
        // What is no greeting at all is known by its first byte; don't wait for 63 more.
        if reader.buffer.first().is_some_and(|&byte| byte != 0xff) {
            return Err(ZmtpError::NotZmtp);
        }
        reader.fill().await?;
    }
    let theirs = reader.buffer.split_to(GREETING_BYTES);
    if theirs[0] != 0xff || theirs[9] != 0x7f || theirs[10] < 3 {
        return Err(ZmtpError::NotZmtp);
    }
    if &theirs[12..32] != b"NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0" {
        return Err(ZmtpError::Mechanism);
    }
    let command = loop {
        match reader.next_frame()? {
            Some(Frame::Command(command)) => break command,
            Some(Frame::Part { .. }) => return Err(ZmtpError::Protocol),
            None => reader.fill().await?,
        }
    };
    if command.starts_with(b"\x05ERROR") {
        return Err(ZmtpError::Refused);
    }
    let properties = command.strip_prefix(b"\x05READY").ok_or(ZmtpError::Protocol)?;
    let theirs = property(properties, b"Socket-Type").ok_or(ZmtpError::Protocol)?;
    if !socket.peers().contains(&theirs) {
        return Err(ZmtpError::SocketType);
    }
    Ok((reader, writer))
}

/// What a SUB socket sends to get the messages whose first part begins with `topic`.
pub fn subscribe(topic: &[u8]) -> Bytes {
    [b"\x01", topic].concat().into()
}

fn put_property(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    out.put_u8(name.len() as u8);
    out.put_slice(name);
    out.put_u32(value.len() as u32);
    out.put_slice(value);
}

/// The value of the property `name` (case doesn't count), where the properties are well-formed up to it.
fn property<'a>(mut properties: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    loop {
        let (&length, rest) = properties.split_first()?;
        let (key, rest) = rest.split_at_checked(length.into())?;
        let (length, rest) = rest.split_first_chunk()?;
        let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        if key.eq_ignore_ascii_case(name) {
            return Some(value);
        }
        properties = rest;
    }
}

fn put_frame(out: &mut BytesMut, flags: u8, body: &[u8]) {
    match u8::try_from(body.len()) {
        Ok(length) => {
            out.put_u8(flags);
            out.put_u8(length);
        }
        Err(_) => {
            out.put_u8(flags | LONG);
            out.put_u64(body.len() as u64);
        }
    }
    out.put_slice(body);
}

enum Frame {
    Command(Bytes),
    Part { body: Bytes, more: bool },
}

/// The receiving half.
#[derive(Debug)]
pub struct Reader<R> {
    read: R,
    buffer: BytesMut,
    /// Parts so far of the message that is coming in.
    message: Message,
    message_bytes: usize,
    limits: Limits,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// The next message.
    ///
    /// Subscriptions that come as commands (ZMTP 3.1) are given back as the messages that they were in 3.0: a first
    /// byte of 1 or 0, and the topic. Other commands are read over.
    ///
    /// Cancellation: nothing is lost; the next call goes on where this one was.
    pub async fn recv(&mut self) -> Result<Message, ZmtpError> {
        loop {
            match self.next_frame()? {
                Some(Frame::Part { body, more }) => {
                    self.message_bytes += body.len();
                    self.message.push(body);
                    if !more {
                        self.message_bytes = 0;
                        return Ok(std::mem::take(&mut self.message));
                    }
                }
                Some(Frame::Command(command)) => {
                    let topic = |name: &[u8], first: u8| {
                        command.strip_prefix(name).map(|topic| vec![[&[first], topic].concat().into()])
                    };
                    if let Some(message) = topic(b"\x09SUBSCRIBE", 1).or_else(|| topic(b"\x06CANCEL", 0)) {
                        return Ok(message);
                    }
                }
                None => self.fill().await?,
            }
        }
    }

    /// Takes one frame out of the buffer, where it is whole.
    fn next_frame(&mut self) -> Result<Option<Frame>, ZmtpError> {
        let Some(&flags) = self.buffer.first() else { return Ok(None) };
        if flags & !(MORE | LONG | COMMAND) != 0 || flags & (COMMAND | MORE) == (COMMAND | MORE) {
            return Err(ZmtpError::Protocol);
        }
        let (head, length) = if flags & LONG == 0 {
            let Some(&length) = self.buffer.get(1) else { return Ok(None) };
            (2, u64::from(length))
        } else {
            let Some(length) = self.buffer.get(1..9) else { return Ok(None) };
            (9, length.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte)))
        };
        let is_command = flags & COMMAND != 0;
        let room = match is_command {
            true => COMMAND_BYTES_MAX,
            false => self.limits.message_bytes_max - self.message_bytes,
        };
        let length = usize::try_from(length).ok().filter(|&length| length <= room);
        let (Some(length), true) = (length, is_command || self.message.len() < self.limits.parts_max) else {
            let Limits { message_bytes_max: bytes_max, parts_max } = self.limits;
            return Err(ZmtpError::TooLarge { bytes_max, parts_max });
        };
        if self.buffer.len() < head + length {
            return Ok(None);
        }
        self.buffer.advance(head);
        let body = self.buffer.split_to(length).freeze();
        Ok(Some(if is_command {
            Frame::Command(body)
        } else {
            Frame::Part { body, more: flags & MORE != 0 }
        }))
    }

    /// Waits for more bytes. Doubles the room of a long message as it comes, so that it is copied once on average.
    async fn fill(&mut self) -> Result<(), ZmtpError> {
        self.buffer.reserve(READ_BYTES.max(self.buffer.len() / 2));
        match self.read.read_buf(&mut self.buffer).await? {
            0 => Err(ZmtpError::Closed),
            _ => Ok(()),
        }
    }
}

/// The sending half.
#[derive(Debug)]
pub struct Writer<W> {
    write: W,
    out: BytesMut,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    /// Sends one message, and returns when the system has taken it. `parts` must not be empty.
    ///
    /// Cancellation: the message may be sent in part; the connection can't be used any more.
    pub async fn send(&mut self, parts: &[Bytes]) -> Result<(), ZmtpError> {
        for (n, part) in parts.iter().enumerate() {
            let flags = if n + 1 < parts.len() { MORE } else { 0 };
            put_frame(&mut self.out, flags, part);
        }
        self.flush().await
    }

    async fn flush(&mut self) -> Result<(), ZmtpError> {
        self.write.write_all(&self.out).await?;
        self.out.clear();
        // One large message must not hold its memory for ever.
        if self.out.capacity() > 1 << 20 {
            self.out = BytesMut::new();
        }
        Ok(())
    }
}
