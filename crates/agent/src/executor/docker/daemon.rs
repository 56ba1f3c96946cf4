//! Reaches one container daemon, Docker's or Podman's, over its unix socket, and says in plain words what goes wrong with it.
//!
//! Invariant: no request waits without end, and each is made in a version of the API that the daemon knows.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::errors::Error;
use bollard::{API_DEFAULT_VERSION, ClientVersion, Docker};
use sealci_core::outcome::Cause;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Where Docker listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/var/run/docker.sock";
/// How long a daemon may take to answer; it may have much to do.
const REQUEST_PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take to say that it is there.
const PING_PATIENCE: Duration = Duration::from_secs(10);
/// The oldest that knows all that is asked for (Docker 19.03).
const OLDEST: ClientVersion = ClientVersion { major_version: 1, minor_version: 40 };

/// Why a daemon did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum DockerError {
    #[error(
        "`{0}` is no unix socket's name: the docker executor talks to a daemon of this host alone, as in `--docker-host unix:///var/run/docker.sock`"
    )]
    Host(String),
    #[error(
        "no container daemon answers at unix://{socket}: is Docker running? the agent needs access to unix://{socket}; set `--docker-host` where it is another"
    )]
    Unreachable {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the container daemon at unix://{socket} did not {doing} in time")]
    Late { socket: PathBuf, doing: String },
    #[error("the container daemon at unix://{socket} did not {doing}: {message}")]
    Refused { socket: PathBuf, doing: String, status: u16, message: String },
    #[error("the container daemon at unix://{socket} went away when it was to {doing}")]
    Lost {
        socket: PathBuf,
        doing: String,
        #[source]
        source: Box<Error>,
    },
    #[error("what answers at unix://{0} is no container daemon: it names no version of Docker's API")]
    Stranger(PathBuf),
    #[error(
        "the container daemon at unix://{socket} knows Docker's API up to version {version}, and {} is needed: install a newer one",
        shown(OLDEST)
    )]
    Old { socket: PathBuf, version: String },
    #[error(
        "the container daemon at unix://{0} gives containers users of their own (`userns-remap`), who cannot write to an action's workspace: take that out of its configuration, or use the executor `container`, which does it itself"
    )]
    Remapped(PathBuf),
}

impl DockerError {
    /// Whose fault it is.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Refused { message, .. } if tells_of_full_disk(message) => Cause::DiskFull,
            _ => Cause::Executor,
        }
    }

    /// Whether what was asked about is not there.
    pub(super) fn is_absence(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
    }
}

/// A daemon has the kernel's words in its own.
pub(super) fn tells_of_full_disk(message: &str) -> bool {
    ["no space left on device", "disk quota exceeded"].iter().any(|words| message.contains(words))
}

fn shown(version: ClientVersion) -> String {
    format!("{}.{}", version.major_version, version.minor_version)
}

/// Reads `unix:///path` or `/path`.
pub fn socket_of(host: &str) -> Result<PathBuf, DockerError> {
    let path = host.strip_prefix("unix://").unwrap_or(host);
    if path.starts_with('/') { Ok(path.into()) } else { Err(DockerError::Host(host.to_owned())) }
}

/// What a daemon says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonInfo {
    pub engine: Engine,
    pub version: String,
    /// The version of Docker's API that is spoken with it.
    pub api_version: String,
    /// As images name it: `amd64`.
    pub architecture: String,
    /// It belongs to an ordinary user: root in a container is that user.
    pub is_rootless: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    Docker,
    Podman,
}

impl Engine {
    /// For people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Docker => "Docker",
            Self::Podman => "Podman",
        }
    }
}

/// Asks who listens at a socket.
pub async fn probe(socket: &Path) -> Result<DaemonInfo, DockerError> {
    Ok(Daemon::reach(socket).await?.1)
}

/// A daemon that has answered once.
#[derive(Debug, Clone)]
pub(super) struct Daemon {
    pub docker: Docker,
    pub socket: PathBuf,
}

impl Daemon {
    pub async fn reach(socket: &Path) -> Result<(Self, DaemonInfo), DockerError> {
        let version = api_version(socket).await?;
        let lost = |source: Error| classify(socket, "tell of itself", source);
        let path = socket.to_string_lossy();
        let docker = Docker::connect_with_unix(&path, REQUEST_PATIENCE.as_secs(), &version).map_err(lost)?;
        let daemon = Self { docker, socket: socket.to_owned() };
        let told = daemon.docker.version().await.map_err(lost)?;
        let info = daemon.docker.info().await.map_err(lost)?;
        let options = info.security_options.unwrap_or_default();
        let has = |name: &str| options.iter().any(|option| option.split(',').any(|part| part == name));
        if has("name=userns") {
            return Err(DockerError::Remapped(daemon.socket));
        }
        let components = told.components.unwrap_or_default();
        let is_podman = components.iter().any(|component| component.name.contains("Podman"));
        let info = DaemonInfo {
            engine: if is_podman { Engine::Podman } else { Engine::Docker },
            version: told.version.unwrap_or_default(),
            api_version: shown(version),
            architecture: told.arch.unwrap_or_default(),
            is_rootless: has("name=rootless"),
        };
        Ok((daemon, info))
    }

    /// Says in our words what went wrong when it was asked to do something.
    pub fn failed(&self, doing: impl Into<String>) -> impl FnOnce(Error) -> DockerError {
        move |error| classify(&self.socket, doing, error)
    }
}

fn classify(socket: &Path, doing: impl Into<String>, error: Error) -> DockerError {
    let (socket, doing) = (socket.to_owned(), doing.into());
    match error {
        Error::DockerResponseServerError { status_code, message } => {
            DockerError::Refused { socket, doing, status: status_code, message }
        }
        Error::DockerStreamError { error } => {
            DockerError::Refused { socket, doing, status: 0, message: error }
        }
        Error::RequestTimeoutError => DockerError::Late { socket, doing },
        Error::SocketNotFoundError(_) => {
            DockerError::Unreachable { socket, source: io::ErrorKind::NotFound.into() }
        }
        Error::HyperLegacyError { err } if err.is_connect() => {
            DockerError::Unreachable { socket, source: io::Error::other(err) }
        }
        other => DockerError::Lost { socket, doing, source: Box::new(other) },
    }
}

/// Asks for the newest version of the API that both know. Every daemon answers this question without one; requests in a
/// version that is too new it refuses.
async fn api_version(socket: &Path) -> Result<ClientVersion, DockerError> {
    let asking = async {
        let mut stream = UnixStream::connect(socket).await?;
        stream.write_all(b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n").await?;
        let mut answer = Vec::new();
        stream.take(16 << 10).read_to_end(&mut answer).await?;
        Ok(answer)
    };
    let answer = match tokio::time::timeout(PING_PATIENCE, asking).await {
        Ok(answer) => {
            answer.map_err(|source| DockerError::Unreachable { socket: socket.to_owned(), source })?
        }
        Err(_) => return Err(DockerError::Late { socket: socket.to_owned(), doing: "answer".to_owned() }),
    };
    let theirs = version_in(&answer).ok_or_else(|| DockerError::Stranger(socket.to_owned()))?;
    if theirs < OLDEST {
        return Err(DockerError::Old { socket: socket.to_owned(), version: shown(theirs) });
    }
    Ok(if theirs < *API_DEFAULT_VERSION { theirs } else { *API_DEFAULT_VERSION })
}

/// Finds the header `Api-Version`.
fn version_in(answer: &[u8]) -> Option<ClientVersion> {
    let text = String::from_utf8_lossy(answer);
    let value = text.lines().take_while(|line| !line.is_empty()).find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("api-version").then(|| value.trim().to_owned())
    })?;
    let (major, minor) = value.split_once('.')?;
    Some(ClientVersion { major_version: major.parse().ok()?, minor_version: minor.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_a_unix_socket() {
        assert_eq!(socket_of("unix:///run/x.sock").unwrap(), Path::new("/run/x.sock"));
        assert_eq!(socket_of("/run/x.sock").unwrap(), Path::new("/run/x.sock"));
        for host in ["tcp://10.0.0.1:2375", "ssh://host", "", "x.sock", "unix://x.sock"] {
            assert!(matches!(socket_of(host), Err(DockerError::Host(_))), "{host}");
        }
    }

    #[test]
    fn the_version_is_a_header() {
        let version = |text: &str| version_in(text.as_bytes()).map(shown);
        assert_eq!(version("HTTP/1.1 200 OK\r\nApi-Version: 1.41\r\n\r\nOK").as_deref(), Some("1.41"));
        assert_eq!(version("HTTP/1.1 200 OK\r\napi-version:1.53\r\n\r\n").as_deref(), Some("1.53"));
        for text in ["", "HTTP/1.1 200 OK\r\n\r\nApi-Version: 1.41", "Api-Version: new", "Api-Version: 1.x"] {
            assert_eq!(version(text), None, "{text}");
        }
    }
}
