//! Has an action's services in its machine: for each a disk with its image's root, and a port behind which its init is.
//!
//! ```text
//!   prepare the action:  images ─▶ roots, a socket for each port ─▶ the machine
//!                                                     │ company, in the neighbourhood
//!   prepare a service:                  its seat, once ◀┘ ─▶ its init calls ─▶ conversation
//! ```
//! These sockets have names, where the action's channel has none: a guest's call has to reach the agent after the monitor was
//! started. They lie in the attempt's own folder, and the monitor ends with the action's channel all the same, so that of a
//! killed agent nothing stays but these names. Everything of a service ends with its machine.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use sealci_core::outcome::Limit;
use sealci_core::plan::Container;
use sealci_guest::wire::{self, machine as inside};
use sealci_image::ImageConfig;
use sealci_microvm::root::Root;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

use super::start_message;
use crate::executor::container::{service_folder, service_program, stop_signal};
use crate::executor::init::{Environment, Opening, encoded};
use crate::executor::{ExecutionRequest, ExecutorError, ServiceRole};

/// How long a machine may take to come up and to have its services call.
const CALL_PATIENCE: Duration = Duration::from_secs(60);

/// What a service is made of.
pub(super) struct Companion {
    pub name: String,
    pub root: Root,
    pub config: ImageConfig,
    /// In the words of images.
    pub user: String,
}

/// The services in one machine. Its copies are one.
#[derive(Debug, Clone)]
pub(in crate::executor) struct Company {
    seats: Arc<Mutex<BTreeMap<String, Seat>>>,
    machine_is_over: CancellationToken,
}

/// Where one of them is expected.
#[derive(Debug)]
pub(super) struct Seat {
    listener: UnixListener,
    config: ImageConfig,
    machine_is_over: CancellationToken,
}

/// What a monitor and a machine's init are told of one of them.
#[derive(Debug)]
pub(super) struct Berth {
    pub root: PathBuf,
    pub socket: PathBuf,
    pub user: String,
}

/// What is said where an action has more services than a machine has room for.
pub(super) fn check_room(request: &ExecutionRequest) -> Result<(), ExecutorError> {
    let count = request.services.len();
    if count <= inside::MOST_SERVICES {
        return Ok(());
    }
    Err(ExecutorError::Unsupported(format!(
        "a machine has room for {} services beside its action, and there are {count}; the executor `container` has room for more",
        inside::MOST_SERVICES
    )))
}

impl Company {
    /// Makes a socket in `folder` for each; in the order of `companions` what the machine is told. Blocks for a moment.
    pub(super) fn gather(
        folder: &Path,
        companions: &[Companion],
    ) -> Result<(Self, Vec<Berth>), ExecutorError> {
        let machine_is_over = CancellationToken::new();
        let (mut seats, mut berths) = (BTreeMap::new(), Vec::new());
        for (place, companion) in companions.iter().enumerate() {
            let name = format!("service-{place}");
            let socket = folder.join(&name);
            let listener = listen(folder, &name)
                .map_err(ExecutorError::io(format_args!("make the socket {}", socket.display())))?;
            let (config, machine_is_over) = (companion.config.clone(), machine_is_over.clone());
            seats.insert(companion.name.clone(), Seat { listener, config, machine_is_over });
            let (root, user) = (companion.root.path().to_owned(), companion.user.clone());
            berths.push(Berth { root, socket, user });
        }
        Ok((Self { seats: Arc::new(Mutex::new(seats)), machine_is_over }, berths))
    }

    /// Whom this service is expected by; once.
    pub(super) fn take(&self, name: &str) -> Result<Seat, ExecutorError> {
        let seat = self.seats.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        seat.ok_or_else(|| {
            ExecutorError::Unsupported(format!("its machine was made without room for the service `{name}`"))
        })
    }

    /// Cancelled when the machine is.
    pub(super) fn machine_is_over(&self) -> &CancellationToken {
        &self.machine_is_over
    }
}

/// A socket has a short name only: the way to its folder may be long, so it is made by the folder's descriptor. Whoever gets
/// there may connect, for root's monitors are nobody.
fn listen(folder: &Path, name: &str) -> io::Result<UnixListener> {
    let open = File::open(folder)?;
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/{name}", open.as_raw_fd()))?;
    fs::set_permissions(folder.join(name), Permissions::from_mode(0o666))?;
    Ok(listener)
}

impl Seat {
    /// Waits until its init calls.
    pub async fn called(&self, stop: &CancellationToken) -> Result<UnixStream, ExecutorError> {
        let failed = ExecutorError::io("have the service in its action's machine");
        tokio::select! {
            called = self.listener.accept() => called.map(|(channel, _)| channel).map_err(failed),
            () = stop.cancelled() => Err(ExecutorError::Stopped),
            () = self.machine_is_over.cancelled() => Err(failed(io::Error::other("that is over"))),
            () = tokio::time::sleep(CALL_PATIENCE) => {
                Err(failed(io::Error::other(format!("its init did not call within {} s", CALL_PATIENCE.as_secs()))))
            }
        }
    }

    /// What its init is told.
    pub fn start(
        &self,
        request: &ExecutionRequest,
        role: &ServiceRole,
        container: &Container,
    ) -> Result<Opening, ExecutorError> {
        let config = &self.config;
        encoded(wire::Start {
            program: service_program(role, container, &config.entrypoint, &config.command)?,
            workdir: service_folder(&config.working_folder).into(),
            stop_signal: stop_signal(&config.stop_signal),
            ..start_message(request, config, Vec::new())
        })
    }
}

/// A service's share of a machine. Its init takes down what is in it when its channel ends, and what hears nothing any more goes
/// with the machine: so there is nothing to be done from outside.
#[derive(Default)]
pub(super) struct Share {
    ran_out_of_memory: bool,
}

#[async_trait]
impl Environment for Share {
    async fn open_up(&mut self) -> Result<(), ExecutorError> {
        Ok(())
    }

    fn ran_out_of_memory(&mut self) {
        self.ran_out_of_memory = true;
    }

    fn kill(&mut self) {}

    fn limit_reached(&self) -> Option<Limit> {
        self.ran_out_of_memory.then_some(Limit::Memory)
    }

    async fn clear(&mut self, _orderly: bool) -> Result<(), String> {
        Ok(())
    }

    fn complaints(&mut self) -> String {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_service_is_waited_for_however_long_the_way_to_its_socket_is() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("deep".repeat(40));
        fs::create_dir(&deep).unwrap();
        let over = CancellationToken::new();
        let listener = listen(&deep, "service-0").unwrap();
        let seat = Seat { listener, config: ImageConfig::default(), machine_is_over: over.clone() };
        let mode = fs::metadata(deep.join("service-0")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o666);

        let open = File::open(&deep).unwrap();
        let _init =
            UnixStream::connect(format!("/proc/self/fd/{}/service-0", open.as_raw_fd())).await.unwrap();
        let stop = CancellationToken::new();
        assert!(seat.called(&stop).await.is_ok());
        over.cancel();
        let message = seat.called(&stop).await.unwrap_err().message();
        assert!(message.contains("that is over"), "{message}");
    }

    #[tokio::test]
    async fn what_is_not_wanted_any_more_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let listener = listen(folder.path(), "service-0").unwrap();
        let machine_is_over = CancellationToken::new();
        let seat = Seat { listener, config: ImageConfig::default(), machine_is_over };
        let stop = CancellationToken::new();
        stop.cancel();
        assert!(matches!(seat.called(&stop).await, Err(ExecutorError::Stopped)));
    }

    /// Beside the roots and the scratch disk a machine has its ports, a card, random numbers and a balloon.
    #[test]
    fn a_monitor_has_room_for_as_many_services_as_are_let_in() {
        assert_eq!(inside::MOST_SERVICES + 6, sealci_vmm::x86_64::layout::MAX_DEVICES);
    }
}
