//! Speaks just enough HTTP/1.1 for the benchmark: requests with JSON, and event streams, on plain loopback connections.
//!
//! Own code, and not the typed client: that would have `cargo xtask` build half of the project before anything is measured.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Nothing here takes longer, but for a service that hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a controller is, and what lets us in.
#[derive(Debug, Clone)]
pub struct Server {
    /// `127.0.0.1:1234`
    pub address: String,
    pub token: String,
}

/// A connection that is kept open between requests.
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<TcpStream>,
    server: Server,
}

/// What of a response's head matters.
struct Head {
    status: u16,
    length: Option<usize>,
}

impl Server {
    pub fn connect(&self) -> Result<Connection> {
        let stream = TcpStream::connect(&self.address).context("cannot reach the controller")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Connection { reader: BufReader::with_capacity(64 << 10, stream), server: self.clone() })
    }
}

impl Connection {
    pub fn get(&mut self, path: &str) -> Result<Value> {
        self.exchange("GET", path, "")
    }

    pub fn post(&mut self, path: &str, body: &Value) -> Result<Value> {
        self.exchange("POST", path, &body.to_string())
    }

    fn exchange(&mut self, method: &str, path: &str, body: &str) -> Result<Value> {
        self.send(method, path, body)?;
        let head = self.head()?;
        let body = match head.length {
            Some(length) => {
                let mut body = vec![0; length];
                self.reader.read_exact(&mut body)?;
                body
            }
            None => {
                let mut body = Vec::new();
                Chunks { reader: &mut self.reader, left: 0, over: false }.read_to_end(&mut body)?;
                body
            }
        };
        if !(200..300).contains(&head.status) {
            bail!("{method} {path}: {} {}", head.status, String::from_utf8_lossy(&body));
        }
        serde_json::from_slice(&body).with_context(|| format!("{method} {path} was not answered with JSON"))
    }

    /// Follows an event stream: `take` is given each event's data, until it says stop or the stream ends.
    pub fn follow(mut self, path: &str, mut take: impl FnMut(Value) -> Result<bool>) -> Result<()> {
        self.send("GET", path, "")?;
        let head = self.head()?;
        if head.status != 200 {
            bail!("GET {path}: {}", head.status);
        }
        let chunks = Chunks { reader: &mut self.reader, left: 0, over: false };
        for line in BufReader::new(chunks).lines() {
            if let Some(data) = line?.strip_prefix("data:")
                && !take(serde_json::from_str(data)?)?
            {
                break;
            }
        }
        Ok(())
    }

    fn send(&mut self, method: &str, path: &str, body: &str) -> Result<()> {
        let Server { address, token } = &self.server;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {token}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.reader.get_mut().write_all(request.as_bytes()).context("the controller hung up")
    }

    fn head(&mut self) -> Result<Head> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let mut head = Head { status: status.context("that is no HTTP response")?, length: None };
        loop {
            line.clear();
            self.reader.read_line(&mut line)?;
            let Some((name, value)) = line.split_once(':') else { return Ok(head) };
            if name.eq_ignore_ascii_case("content-length") {
                head.length = Some(value.trim().parse()?);
            }
        }
    }
}

/// A body in chunks (RFC 9112, section 7.1), as bytes.
struct Chunks<'a> {
    reader: &'a mut BufReader<TcpStream>,
    /// Of the chunk that is being read.
    left: usize,
    over: bool,
}

impl Read for Chunks<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.left == 0 && !self.over {
            let mut line = String::new();
            self.reader.read_line(&mut line)?;
            self.left = usize::from_str_radix(line.trim(), 16).map_err(std::io::Error::other)?;
            if self.left == 0 {
                self.over = true;
                self.reader.read_line(&mut line)?;
            }
        }
        if self.over {
            // Not even nothing may be asked of the connection now: it would wait for more.
            return Ok(0);
        }
        let wanted = buffer.len().min(self.left);
        let count = self.reader.read(&mut buffer[..wanted])?;
        self.left -= count;
        if count > 0 && self.left == 0 {
            self.reader.read_line(&mut String::new())?;
        }
        Ok(count)
    }
}
