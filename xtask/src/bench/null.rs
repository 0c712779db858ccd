//! An upstream that answers at once: what is left of a request's time is that of the layers in front of it.
//!
//! Just enough HTTP/1.1 for two known clients: keep-alive, `content-length` bodies, a thread per connection.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use anyhow::Context;

/// Largest request; the benchmark's have a few hundred bytes.
const BODY_BYTES_MAX: usize = 4 << 20;

const MODELS: &str =
    r#"{"object":"list","data":[{"id":"null","object":"model","created":0,"owned_by":"bench"}]}"#;

/// Answers on loopback until the process ends; gives back its base URL.
pub fn start() -> anyhow::Result<String> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port on loopback")?;
    let url = format!("http://{}", listener.local_addr()?);
    std::thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            // A client that leaves, or one that does not speak as expected, ends its own connection only.
            std::thread::spawn(move || {
                let _ = serve(&socket);
            });
        }
    });
    Ok(url)
}

fn serve(socket: &TcpStream) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let mut reader = BufReader::new(socket);
    let mut writer = socket;
    let (mut line, mut body) = (String::new(), Vec::new());
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut length = 0;
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            let header = line.trim_end();
            if header.is_empty() {
                break;
            }
            if let Some((name, value)) = header.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().map_err(std::io::Error::other)?;
            }
        }
        if length > BODY_BYTES_MAX {
            return Err(std::io::Error::other("the request is too large"));
        }
        body.resize(length, 0);
        reader.read_exact(&mut body)?;
        writer.write_all(answer(&path, &body).as_bytes())?;
    }
}

/// The whole answer, sent by one write.
fn answer(path: &str, body: &[u8]) -> String {
    let json = |status: &str, body: &str| {
        format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    match path {
        "/health" => json("200 OK", "{}"),
        "/v1/models" => json("200 OK", MODELS),
        "/v1/chat/completions" => {
            let streamed =
                serde_json::from_slice::<serde_json::Value>(body).is_ok_and(|body| body["stream"] == true);
            if streamed { stream() } else { json("200 OK", COMPLETION) }
        }
        _ => json("404 Not Found", r#"{"error":{"message":"not here","type":"invalid_request_error"}}"#),
    }
}

const COMPLETION: &str = concat!(
    r#"{"id":"chatcmpl-0","object":"chat.completion","created":0,"model":"null","choices":[{"index":0,"message":"#,
    r#"{"role":"assistant","content":"ok"},"finish_reason":"length"}],"usage":{"prompt_tokens":8,"#,
    r#""completion_tokens":1,"total_tokens":9}}"#
);

fn stream() -> String {
    let chunk = |choices: &str, usage: &str| {
        let head = r#""id":"chatcmpl-0","object":"chat.completion.chunk","created":0,"model":"null""#;
        format!("data: {{{head},\"choices\":[{choices}]{usage}}}\n\n")
    };
    let events = [
        chunk(r#"{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}"#, ""),
        chunk(r#"{"index":0,"delta":{"content":"ok"},"finish_reason":null}"#, ""),
        chunk(r#"{"index":0,"delta":{},"finish_reason":"length"}"#, ""),
        chunk("", r#","usage":{"prompt_tokens":8,"completion_tokens":1,"total_tokens":9}"#),
        "data: [DONE]\n\n".to_owned(),
    ];
    let mut out =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
    for event in events {
        out.push_str(&format!("{:x}\r\n{event}\r\n", event.len()));
    }
    out.push_str("0\r\n\r\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_requests_on_one_connection() {
        let url = start().expect("loopback is there");
        let mut socket = TcpStream::connect(url.trim_start_matches("http://")).expect("it listens");
        let mut ask = |body: &str, end: &str| {
            let head = "POST /v1/chat/completions HTTP/1.1\r\nContent-Length: ";
            write!(socket, "{head}{}\r\n\r\n{body}", body.len()).expect("it reads");
            let (mut text, mut bytes) = (String::new(), [0; 4096]);
            while !text.ends_with(end) {
                let n = socket.read(&mut bytes).expect("it answers");
                assert!(n > 0, "{text}");
                text.push_str(&String::from_utf8_lossy(&bytes[..n]));
            }
            text
        };
        let streamed = ask(r#"{"stream": true}"#, "0\r\n\r\n");
        assert!(streamed.contains("text/event-stream") && streamed.contains("data: [DONE]"), "{streamed}");
        for event in
            streamed.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|e| *e != "[DONE]")
        {
            serde_json::from_str::<serde_json::Value>(event).expect("an event is JSON");
        }
        assert!(ask("{}", "}}").contains("chat.completion\""));
    }
}
