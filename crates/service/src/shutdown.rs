//! Turns the signals that ask a process to end into a cancellation.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// SIGTERM and SIGINT, listened to from the moment this is made.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Starts listening; from then on these signals no longer end the process by themselves.
    pub fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next of them and names it.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    /// Cancels the token at the first signal, and returns. A second signal is then the caller's to wait for, if it
    /// wants to end at once.
    pub async fn cancel_at_first(&mut self, shutdown: &CancellationToken) -> &'static str {
        let name = self.next().await;
        tracing::info!(signal = name, "asked to end");
        shutdown.cancel();
        name
    }
}
