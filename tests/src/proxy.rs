//! Stands between two services on loopback, and holds up or loses what goes one way.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A way to a server on which what comes back arrives late.
pub struct SlowWay {
    address: SocketAddr,
}

impl SlowWay {
    /// Opens one to the server at this URL.
    pub fn to(url: &str, late: Duration) -> Self {
        let server = address_of(url);
        let (listener, address) = listener();
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

/// A way to a server on which what the dialler says can be lost, while it still hears all.
pub struct LosingWay {
    address: SocketAddr,
    state: Arc<Losing>,
}

#[derive(Default)]
struct Losing {
    loses: AtomicBool,
    /// Both ends of every connection.
    open: Mutex<Vec<TcpStream>>,
}

impl LosingWay {
    /// Opens one to the server at this URL.
    pub fn to(url: &str) -> Self {
        let server = address_of(url);
        let (listener, address) = listener();
        let state: Arc<Losing> = Arc::default();
        let way = Self { address, state: state.clone() };
        // It and its connections end with the test's process: both ends are the test's own.
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if let Ok(server) = TcpStream::connect(server) {
                    state.carry(client, server);
                }
            }
        });
        way
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on what the dialler says is lost, on the connections that there are.
    pub fn lose(&self) {
        self.state.loses.store(true, Ordering::SeqCst);
    }

    /// Closes all connections; those that follow lose nothing.
    pub fn mend(&self) {
        for end in self.state.open.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
        self.state.loses.store(false, Ordering::SeqCst);
    }
}

impl Losing {
    fn carry(self: &Arc<Self>, mut client: TcpStream, mut server: TcpStream) {
        let (Ok(mut to_client), Ok(mut from_server)) = (client.try_clone(), server.try_clone()) else {
            return;
        };
        {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.extend([client.try_clone(), server.try_clone()].into_iter().flatten());
        }
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from_server, &mut to_client);
            let _ = to_client.shutdown(Shutdown::Both);
        });
        let state = self.clone();
        std::thread::spawn(move || {
            let mut piece = vec![0; 64 << 10];
            while let Ok(length @ 1..) = client.read(&mut piece) {
                if !state.loses.load(Ordering::SeqCst) && server.write_all(&piece[..length]).is_err() {
                    break;
                }
            }
            let _ = server.shutdown(Shutdown::Both);
        });
    }
}

fn address_of(url: &str) -> SocketAddr {
    let address = url.split_once("://").expect("it has a scheme").1.trim_end_matches('/');
    address.parse().expect("it is an address")
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("loopback has a port left");
    let address = listener.local_addr().expect("it is bound");
    (listener, address)
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
