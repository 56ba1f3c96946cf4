//! Runs services in this process until a signal ends them, or one of them ends by itself.
//!
//! The first SIGTERM or SIGINT asks all of them to end, a second one ends the process at once. A service that ends unasked
//! takes the others with it: half an installation is none.

use std::fs;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use sealci_service::listen::{self, Door, ListenError, Security};
use sealci_service::shutdown::Signals;
use sealci_service::telemetry;
use sealci_service::tls::Identity;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::exit::{Exit, Failure};

type Run = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>;

/// A service whose door is open, and that is ready to run.
pub struct Service {
    pub name: &'static str,
    /// Where it is reached; empty for one that only dials out.
    pub url: String,
    run: Run,
}

impl Service {
    /// A service behind a listener: its address is logged, and written to a file if one is asked for.
    pub fn listening(
        name: &'static str,
        url: String,
        announce: Option<&Path>,
        run: impl Future<Output = Result<(), Failure>> + Send + 'static,
    ) -> Result<Self, Failure> {
        tracing::info!(service = name, %url, "listening");
        if let Some(path) = announce {
            announce_at(path, &url).map_err(|error| {
                Failure::of_error(Exit::Infrastructure, format!("cannot write {}", path.display()), &error)
            })?;
        }
        Ok(Self { name, url, run: Box::pin(run) })
    }

    /// A service that only dials out.
    pub fn dialling(
        name: &'static str,
        run: impl Future<Output = Result<(), Failure>> + Send + 'static,
    ) -> Self {
        Self { name, url: String::new(), run: Box::pin(run) }
    }

    /// Runs it alone.
    pub async fn run(self) -> Result<(), Failure> {
        self.run.await
    }
}

/// Writes the address as one line, in a file that appears whole.
fn announce_at(path: &Path, url: &str) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    fs::write(&new, format!("{url}\n"))?;
    fs::rename(&new, path)
}

/// Starts this process's log. `default` is what is logged where `SEALCI_LOG` says nothing.
pub fn start_log(default: &str) -> Result<(), Failure> {
    telemetry::init_with_default(telemetry::Format::Human, default)
        .map_err(|error| Failure::of_error(Exit::Usage, "cannot start the log", &error))
}

/// Opens a service's door; it and its URL.
pub async fn bind(
    name: &str,
    address: SocketAddr,
    identity: Option<&Identity>,
) -> Result<(Door, String), Failure> {
    let (scheme, security) = match identity {
        Some(identity) => ("https", Security::Tls(identity.server_config())),
        None => ("http", Security::PlainLoopback),
    };
    match listen::bind(address, security).await {
        Ok((door, bound)) => Ok((door, format!("{scheme}://{bound}"))),
        Err(error @ ListenError::NeedsTls { .. }) => Err(Failure::usage(error.to_string()).help(format!(
            "run `sealci {name}` with --tls-cert FILE --tls-key FILE ($SEALCI_TLS_CERT, $SEALCI_TLS_KEY)"
        ))),
        Err(error) => Err(Failure::of_error(Exit::Infrastructure, format!("the {name} has no door"), &error)),
    }
}

/// What a service's end means.
pub fn ended<E: std::error::Error + 'static>(name: &str, result: Result<(), E>) -> Result<(), Failure> {
    result.map_err(|error| Failure::of_error(Exit::Infrastructure, format!("the {name} ended"), &error))
}

/// Services that are running.
pub struct Running {
    tasks: JoinSet<Result<(), Failure>>,
    stop: CancellationToken,
}

impl Running {
    pub fn start(services: Vec<Service>, stop: CancellationToken) -> Self {
        let mut tasks = JoinSet::new();
        for Service { name, run, .. } in services {
            let stop = stop.clone();
            tasks.spawn(async move {
                let ended = run.await;
                if !stop.is_cancelled() && ended.is_ok() {
                    return Err(Failure::infrastructure(format!(
                        "the {name} ended, though nobody asked it to"
                    )));
                }
                ended
            });
        }
        Self { tasks, stop }
    }

    /// Waits until a service ends by itself; its failure.
    pub async fn broken(&mut self) -> Failure {
        match self.tasks.join_next().await {
            Some(Ok(Err(failure))) => failure,
            Some(Err(error)) => Failure::infrastructure(format!("a service broke off: {error}")),
            Some(Ok(Ok(()))) | None => Failure::infrastructure("a service ended"),
        }
    }

    /// Asks all services to end, and waits until they have.
    pub async fn stop(mut self) -> Result<(), Failure> {
        self.stop.cancel();
        let mut result = Ok(());
        while let Some(ended) = self.tasks.join_next().await {
            match ended {
                Ok(Err(failure)) => result = Err(failure),
                Err(error) => result = Err(Failure::infrastructure(format!("a service broke off: {error}"))),
                Ok(Ok(())) => {}
            }
        }
        result
    }
}

/// Runs services until a signal ends them.
pub async fn run(services: Vec<Service>, stop: CancellationToken) -> Result<Exit, Failure> {
    let mut signals = signals()?;
    let mut running = Running::start(services, stop);
    let failure = tokio::select! {
        failure = running.broken() => Some(failure),
        _ = signals.next() => None,
    };
    end(running, &mut signals, failure.map_or(Ok(Exit::Passed), Err)).await
}

/// Listens for signals from now on.
pub fn signals() -> Result<Signals, Failure> {
    Signals::listen()
        .map_err(|error| Failure::of_error(Exit::Infrastructure, "cannot listen for signals", &error))
}

/// Ends the services in order; a signal meanwhile ends the wait. What is known of the outcome already wins.
pub async fn end(
    running: Running,
    signals: &mut Signals,
    outcome: Result<Exit, Failure>,
) -> Result<Exit, Failure> {
    let stopped = tokio::select! {
        stopped = running.stop() => stopped,
        _ = signals.next() => return Ok(Exit::Interrupted),
    };
    let exit = outcome?;
    stopped.map(|()| exit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(run: impl Future<Output = Result<(), Failure>> + Send + 'static) -> Service {
        Service { name: "test", url: String::new(), run: Box::pin(run) }
    }

    #[tokio::test]
    async fn one_that_ends_unasked_is_a_failure_and_ends_the_others() {
        let stop = CancellationToken::new();
        let other = stop.clone();
        let services = vec![
            service(async { Ok(()) }),
            service(async move {
                other.cancelled().await;
                Ok(())
            }),
        ];
        let mut running = Running::start(services, stop);
        assert!(running.broken().await.message.contains("nobody asked"));
        running.stop().await.unwrap();
    }

    #[tokio::test]
    async fn asked_to_end_they_end_well() {
        let stop = CancellationToken::new();
        let asked = stop.clone();
        let running = Running::start(
            vec![service(async move {
                asked.cancelled().await;
                Ok(())
            })],
            stop,
        );
        running.stop().await.unwrap();
    }

    #[test]
    fn an_announcement_is_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("address");
        announce_at(&path, "http://127.0.0.1:1").unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), "http://127.0.0.1:1\n");
    }
}
