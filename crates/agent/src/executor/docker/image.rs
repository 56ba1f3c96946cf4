//! Has the daemon bring an image, and reads what the image says about how to run it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bollard::auth::DockerCredentials;
use bollard::errors::Error;
use bollard::models::{CreateImageInfo, ImageInspect};
use bollard::query_parameters::CreateImageOptionsBuilder;
use futures_util::StreamExt;
use sealci_core::plan::{Container, Pull};
use sealci_image::{Credentials, ImageReference, Login, RegistryReference};
use secrecy::ExposeSecret as _;

use super::daemon::{Daemon, DaemonInfo, DockerError, tells_of_full_disk};
use crate::executor::{ExecutorError, Notes};

/// Between two lines about one pull.
const NOTE_INTERVAL: Duration = Duration::from_secs(5);

/// How images are pulled.
#[derive(Debug, Clone)]
pub struct PullOptions {
    /// A docker config file with logins, as `docker login` writes it: the daemon itself knows none.
    pub credentials: Option<PathBuf>,
    /// How long a pull may tell of nothing new.
    pub patience: Duration,
}

impl Default for PullOptions {
    fn default() -> Self {
        Self { credentials: None, patience: Duration::from_secs(120) }
    }
}

/// Why an image cannot be had from a daemon.
#[derive(Debug, thiserror::Error)]
enum PullError {
    #[error(
        "the daemon does not have it, and the manifest says `pull: never`; pull it there, or say `pull: if-missing`"
    )]
    Absent,
    #[error("the daemon could not pull it: {0}")]
    Refused(String),
    #[error("its pull told of nothing new for {0:?}: does its registry answer?")]
    Stalled(Duration),
    #[error("it is for {image}, and this daemon runs {daemon}; name an image that is made for it")]
    Platform { image: String, daemon: String },
    #[error(
        "the login for {registry} is kept by the program `docker-credential-{program}`, which is not run here; put it into `auths` of {}", file.display()
    )]
    Helper { registry: String, program: String, file: PathBuf },
    #[error("the logins in {} cannot be used: {problem}", file.display())]
    Credentials { file: PathBuf, problem: String },
}

impl PullError {
    /// Whether the same, asked again, may go better. A daemon has words alone for what its registry said.
    fn may_pass(&self) -> bool {
        const LASTING: [&str; 7] = [
            "not found",
            "unknown",
            "denied",
            "unauthorized",
            "no basic auth credentials",
            "no matching manifest",
            "does not exist",
        ];
        match self {
            Self::Stalled(_) => true,
            Self::Refused(said) => !LASTING.iter().any(|words| said.contains(words)),
            _ => false,
        }
    }
}

/// What an image says about how to run it.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// What is run, whatever its name comes to mean meanwhile.
    pub id: String,
    pub env: BTreeMap<String, String>,
    pub entrypoint: Vec<String>,
    pub command: Vec<String>,
    pub working_folder: String,
    pub stop_signal: String,
    pub user: String,
}

/// Has the image with the daemon. Dropping the future gives up.
pub(super) async fn obtain(
    daemon: &Daemon,
    info: &DaemonInfo,
    options: &PullOptions,
    container: &Container,
    notes: &Notes,
) -> Result<Facts, ExecutorError> {
    let failed = |error: PullError| {
        let disk_full = matches!(&error, PullError::Refused(message) if tells_of_full_disk(message));
        let image = container.image.clone();
        match error.may_pass() && !disk_full {
            true => ExecutorError::Registry { image, source: Box::new(error) },
            false => ExecutorError::Image { image, source: Box::new(error), disk_full },
        }
    };
    let reference = reference(&container.image)?;
    let name = reference.to_string();
    let held = if container.pull == Pull::Always { None } else { inspect(daemon, &name).await? };
    let image = match (held, container.pull) {
        (Some(image), _) => image,
        (None, Pull::Never) => return Err(failed(PullError::Absent)),
        (None, _) => {
            let login = login(options.credentials.as_deref(), &reference).map_err(failed)?;
            pull(daemon, &name, login, options.patience, notes).await?.map_err(failed)?;
            let gone = || failed(PullError::Refused("it is not there after its pull".to_owned()));
            inspect(daemon, &name).await?.ok_or_else(gone)?
        }
    };
    let (os, architecture) =
        (image.os.clone().unwrap_or_default(), image.architecture.clone().unwrap_or_default());
    if !runs(&os, &architecture, &info.architecture) {
        let image = format!("{os}/{architecture}");
        return Err(failed(PullError::Platform { image, daemon: format!("linux/{}", info.architecture) }));
    }
    Ok(facts(name, image))
}

/// A daemon has its images from registries, or has them already.
fn reference(text: &str) -> Result<RegistryReference, ExecutorError> {
    match text.parse() {
        Ok(ImageReference::Registry(reference)) => Ok(reference),
        Ok(_) => Err(ExecutorError::Unsupported(format!(
            "the executor `docker` has images from registries alone, and `{text}` is a file or folder; `container` runs those"
        ))),
        Err(error) => Err(ExecutorError::Unsupported(format!("`{text}` names no image: {error}"))),
    }
}

async fn inspect(daemon: &Daemon, name: &str) -> Result<Option<ImageInspect>, DockerError> {
    match daemon.docker.inspect_image(name).await.map_err(daemon.failed(format!("show the image {name}"))) {
        Ok(image) => Ok(Some(image)),
        Err(error) if error.is_absence() => Ok(None),
        Err(error) => Err(error),
    }
}

fn facts(name: String, image: ImageInspect) -> Facts {
    let config = image.config.unwrap_or_default();
    let pair = |entry: String| {
        let (name, value) = entry.split_once('=')?;
        Some((name.to_owned(), value.to_owned()))
    };
    Facts {
        id: image.id.unwrap_or(name),
        env: config.env.unwrap_or_default().into_iter().filter_map(pair).collect(),
        entrypoint: config.entrypoint.unwrap_or_default(),
        command: config.cmd.unwrap_or_default(),
        working_folder: config.working_dir.unwrap_or_default(),
        stop_signal: config.stop_signal.unwrap_or_default(),
        user: config.user.unwrap_or_default(),
    }
}

/// Whether a daemon's machine runs an image's programs. What says nothing is tried.
fn runs(os: &str, image: &str, machine: &str) -> bool {
    let is_known_pair = matches!((image, machine), ("386", "amd64") | ("arm", "arm64"));
    matches!(os, "" | "linux")
        && (image.is_empty() || machine.is_empty() || image == machine || is_known_pair)
}

async fn pull(
    daemon: &Daemon,
    name: &str,
    login: Option<DockerCredentials>,
    patience: Duration,
    notes: &Notes,
) -> Result<Result<(), PullError>, DockerError> {
    notes.say(format_args!("pulling {name}"));
    let options = CreateImageOptionsBuilder::new().from_image(name).build();
    let mut news = daemon.docker.create_image(Some(options), None, login);
    let mut progress = Progress::default();
    loop {
        match tokio::time::timeout(patience, news.next()).await {
            Err(_) => return Ok(Err(PullError::Stalled(patience))),
            Ok(None) => break,
            Ok(Some(Ok(piece))) => {
                if let Some(line) = progress.take(piece, Instant::now()) {
                    notes.say(format_args!("pulling {name}: {line}"));
                }
            }
            Ok(Some(Err(Error::DockerStreamError { error }))) => return Ok(Err(PullError::Refused(error))),
            Ok(Some(Err(Error::DockerResponseServerError { message, .. }))) => {
                return Ok(Err(PullError::Refused(message)));
            }
            Ok(Some(Err(error))) => return Err(daemon.failed(format!("pull {name}"))(error)),
        }
    }
    notes.say(format_args!("pulled {name}"));
    Ok(Ok(()))
}

/// How far a pull has come.
#[derive(Default)]
struct Progress {
    /// By layer: what is there of it, and how much there will be.
    layers: BTreeMap<String, (i64, i64)>,
    told_at: Option<Instant>,
}

impl Progress {
    /// What there is to say now, if it is time again.
    fn take(&mut self, piece: CreateImageInfo, now: Instant) -> Option<String> {
        let (id, detail) = (piece.id?, piece.progress_detail?);
        if piece.status.as_deref() != Some("Downloading") {
            return None;
        }
        self.layers.insert(id, (detail.current?, detail.total.unwrap_or(0)));
        let told_at = *self.told_at.get_or_insert(now);
        if now.duration_since(told_at) < NOTE_INTERVAL {
            return None;
        }
        self.told_at = Some(now);
        let (there, total) = self
            .layers
            .values()
            .fold((0, 0), |(there, total), (more, of)| (there + more, total + of.max(more)));
        Some(format!("{} of {} MB", there / 1_000_000, total / 1_000_000))
    }
}

/// What the registry is to be told, if anything.
fn login(file: Option<&Path>, reference: &RegistryReference) -> Result<Option<DockerCredentials>, PullError> {
    let Some(file) = file else { return Ok(None) };
    let unusable = |problem: String| PullError::Credentials { file: file.to_owned(), problem };
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unusable(error.to_string())),
    };
    let known = Credentials::from_docker_config(&text).map_err(|error| unusable(error.to_string()))?;
    let given = DockerCredentials { serveraddress: Some(reference.registry.clone()), ..Default::default() };
    match known.login(&reference.registry, &reference.repository) {
        None => Ok(None),
        Some(Login::Password { user, password }) => Ok(Some(DockerCredentials {
            username: Some(user.clone()),
            password: Some(password.expose_secret().to_owned()),
            ..given
        })),
        Some(Login::IdentityToken(token)) => {
            Ok(Some(DockerCredentials { identitytoken: Some(token.expose_secret().to_owned()), ..given }))
        }
        Some(Login::Helper(program)) => Err(PullError::Helper {
            registry: reference.registry.clone(),
            program: program.clone(),
            file: file.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use bollard::models::ProgressDetail;

    use super::*;

    #[test]
    fn a_machine_runs_its_own_images() {
        for (os, image, machine, expected) in [
            ("linux", "amd64", "amd64", true),
            ("linux", "386", "amd64", true),
            ("linux", "arm64", "amd64", false),
            ("linux", "amd64", "386", false),
            ("windows", "amd64", "amd64", false),
            ("", "", "amd64", true),
        ] {
            assert_eq!(runs(os, image, machine), expected, "{os}/{image} on {machine}");
        }
    }

    #[test]
    fn progress_is_told_now_and_then() {
        let piece = |id: &str, current| CreateImageInfo {
            id: Some(id.to_owned()),
            status: Some("Downloading".to_owned()),
            progress_detail: Some(ProgressDetail { current: Some(current), total: Some(9_000_000) }),
            ..CreateImageInfo::default()
        };
        let (mut progress, start) = (Progress::default(), Instant::now());
        assert_eq!(progress.take(piece("a", 1_000_000), start), None);
        assert_eq!(progress.take(piece("b", 2_000_000), start), None);
        let later = start + NOTE_INTERVAL;
        assert_eq!(progress.take(piece("a", 4_000_000), later).as_deref(), Some("6 of 18 MB"));
        assert_eq!(progress.take(piece("a", 5_000_000), later), None);
    }
}
