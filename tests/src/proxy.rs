//! Stands between two services on loopback, and holds up what goes one way.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// A way to a server on which what comes back arrives late.
pub struct SlowWay {
    address: SocketAddr,
}

impl SlowWay {
    /// Opens one to the server at this URL.
    pub fn to(url: &str, late: Duration) -> Self {
        let server: SocketAddr = url
            .split_once("://")
            .expect("it has a scheme")
            .1
            .trim_end_matches('/')
            .parse()
            .expect("it is an address");
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("loopback has a port left");
        let address = listener.local_addr().expect("it is bound");
        // It and its connections end with the test's process: both ends are the test's own.
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if let Ok(server) = TcpStream::connect(server) {
                    carry(client, server, late);
                }
            }
        });
        Self { address }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

fn carry(client: TcpStream, server: TcpStream, late: Duration) {
    let both = || Some((client.try_clone().ok()?, server.try_clone().ok()?));
    let (Some((mut from_client, mut to_server)), Some((mut to_client, mut from_server))) = (both(), both())
    else {
        return;
    };
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Both);
    });
    let (sender, pieces): (Sender<(Instant, Vec<u8>)>, Receiver<_>) = channel();
    std::thread::spawn(move || {
        let mut piece = vec![0; 64 << 10];
        while let Ok(length @ 1..) = from_server.read(&mut piece) {
            if sender.send((Instant::now() + late, piece[..length].to_vec())).is_err() {
                break;
            }
        }
    });
    std::thread::spawn(move || {
        for (due, piece) in pieces {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if to_client.write_all(&piece).is_err() {
                break;
            }
        }
        let _ = to_client.shutdown(Shutdown::Both);
    });
}
