//! Runs an S3 server for a test: moto's.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use crate::{beside, eventually};

const BUCKET: &str = "sealci";

/// A server of objects in a bucket. What it holds goes with it.
pub struct S3 {
    address: SocketAddr,
    process: Child,
}

impl S3 {
    /// Starts one; says why there is none.
    pub fn start() -> Result<Self, String> {
        let program = std::env::var("SEALCI_TEST_S3").unwrap_or_else(|_| "moto_server".to_owned());
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a port left");
        let address = listener.local_addr().expect("it is bound");
        drop(listener);
        let mut command = Command::new(&program);
        command.args(["-H", "127.0.0.1", "-p", &address.port().to_string()]);
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let process = process.map_err(|error| format!("`{program}` cannot be run: {error}"))?;
        let server = Self { address, process };
        eventually("the S3 server", || {
            server.asked("PUT", "").filter(|answer| answer.contains(" 200 ")).map(|_| ())
        });
        Ok(server)
    }

    /// Where objects go, as `--objects` has it.
    pub fn location(&self) -> String {
        format!("s3://{BUCKET}/objects")
    }

    /// What a service needs in its environment.
    pub fn environment(&self) -> [(String, String); 5] {
        [
            ("AWS_ENDPOINT", format!("http://{}", self.address)),
            ("AWS_ACCESS_KEY_ID", "test".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "test".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
    }

    /// How many objects of logs there are.
    pub fn logs(&self) -> usize {
        let listed = self.asked("GET", "?list-type=2").expect("the server answers");
        listed.matches("<Key>objects/logs/").count()
    }

    /// It takes connections and says nothing.
    pub fn hang(&self) {
        beside::signal(self.process.id(), "STOP");
    }

    pub fn wake(&self) {
        beside::signal(self.process.id(), "CONT");
    }

    fn asked(&self, method: &str, query: &str) -> Option<String> {
        let mut stream = TcpStream::connect(self.address).ok()?;
        let head = format!("{method} /{BUCKET}{query} HTTP/1.1\r\nhost: {}\r\n", self.address);
        stream.write_all(format!("{head}connection: close\r\ncontent-length: 0\r\n\r\n").as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
