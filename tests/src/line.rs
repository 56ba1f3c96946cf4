//! Puts a line between two services that a test can cut: bytes pass, until the kernel drops every packet of it.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;

/// Which packets of a line are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    Both,
    /// What the one that dialled sends.
    FromDialler,
    /// What the one that was dialled sends.
    ToDialler,
}

impl Cut {
    fn rules(self) -> &'static [&'static str] {
        match self {
            Self::Both => &["--dport", "--sport"],
            Self::FromDialler => &["--dport"],
            Self::ToDialler => &["--sport"],
        }
    }
}

/// A port that leads to another address.
pub struct Line {
    port: u16,
    cut: Option<Cut>,
}

impl Line {
    /// A line to `http://address:port`. Its threads end with the connections that they carry, or with the test's process.
    pub fn to(url: &str) -> Self {
        let address: SocketAddr =
            url.rsplit('/').next().and_then(|text| text.parse().ok()).expect("an address");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
        let port = listener.local_addr().expect("it listens").port();
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if let Ok(far) = TcpStream::connect(address) {
                    carry(&near, &far);
                    carry(&far, &near);
                }
            }
        });
        Self { port, cut: None }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// From now on the kernel drops these packets, without a word to either end.
    pub fn cut(&mut self, cut: Cut) {
        self.mend();
        for rule in cut.rules() {
            iptables("-I", rule, self.port);
        }
        self.cut = Some(cut);
    }

    pub fn mend(&mut self) {
        for rule in self.cut.take().map(Cut::rules).unwrap_or_default() {
            iptables("-D", rule, self.port);
        }
    }

    /// Whether packets can be dropped on this machine.
    pub fn can_be_cut() -> bool {
        Command::new("iptables")
            .args(["-w", "-L", "OUTPUT", "-n"])
            .output()
            .is_ok_and(|output| output.status.success())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.mend();
    }
}

fn iptables(what: &str, which: &str, port: u16) {
    let port = port.to_string();
    let arguments = ["-w", what, "OUTPUT", "-o", "lo", "-p", "tcp", which, &port, "-j", "DROP"];
    let output = Command::new("iptables").args(arguments).output().expect("iptables can be run");
    assert!(output.status.success(), "iptables: {}", String::from_utf8_lossy(&output.stderr));
}

fn carry(from: &TcpStream, to: &TcpStream) {
    let (Ok(mut from), Ok(mut to)) = (from.try_clone(), to.try_clone()) else { return };
    thread::spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Both);
        let _ = from.shutdown(std::net::Shutdown::Both);
    });
}
