//! Turns SIGTERM and SIGINT into a token that everything can wait for.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Cancels a token at the first SIGTERM or SIGINT, another at the second. Runs until the second, or until dropped.
pub async fn watch_signals(first: CancellationToken, second: CancellationToken) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    for token in [first, second] {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        token.cancel();
    }
    Ok(())
}
