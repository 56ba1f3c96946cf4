//! Turns a request to make a pipeline into a [`NewPipeline`]: who it is about, which manifest, what the plan is.

use async_trait::async_trait;
use sealci_core::event::{Event, EventKind, InvalidName, RefName, Revision};
use sealci_core::manifest::{self, ManifestErrors, ManifestSource};
use sealci_core::repository::{InvalidRepositoryUrl, RepositoryIdentity};
use sha2::{Digest, Sha256};

use crate::dispatch::NewPipeline;

/// Where a manifest stands unless told otherwise.
pub const DEFAULT_MANIFEST_PATH: &str = ".sealci/pipeline.yaml";

/// What someone asks for. None of it has been checked.
#[derive(Debug, Clone, Default)]
pub struct Request {
    pub repo_url: String,
    pub r#ref: Option<String>,
    pub revision: Option<String>,
    pub event: Option<EventKind>,
    /// The manifest itself; without it, it is read from the repository.
    pub body: Option<String>,
    pub manifest_path: Option<String>,
    /// Makes a pipeline by hand unique.
    pub request_id: Option<String>,
}

/// Reads repositories, wherever they are.
#[async_trait]
pub trait Repositories: Send + Sync + std::fmt::Debug {
    /// Whether the URL is one that may be read at all.
    fn check(&self, url: &str) -> Result<(), RepositoryError>;

    /// The newest revision of a ref, or of the default branch, with its full name.
    async fn resolve(
        &self,
        url: &str,
        r#ref: Option<&RefName>,
    ) -> Result<(RefName, Revision), RepositoryError>;

    /// A file at a revision, at most 1 MiB of it.
    async fn read(
        &self,
        url: &str,
        r#ref: Option<&RefName>,
        revision: &Revision,
        path: &str,
    ) -> Result<Vec<u8>, RepositoryError>;
}

/// Why a repository could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// The URL may not be read by this controller.
    #[error("{0}")]
    NotAllowed(String),
    /// It was reached, and has no such ref, revision or file.
    #[error("{0}")]
    NotFound(String),
    /// It could not be reached, or not in time.
    #[error("{0}")]
    Unreachable(String),
}

/// Why a request makes no pipeline.
#[derive(Debug, thiserror::Error)]
pub enum IntakeError {
    #[error(transparent)]
    Url(#[from] InvalidRepositoryUrl),
    #[error(transparent)]
    Name(#[from] InvalidName),
    #[error("an event by hand needs a request id, so that it is made once: give `request_id`")]
    ManualWithoutId,
    #[error("a {0} event needs a `ref`")]
    WithoutRef(&'static str),
    #[error("a {event} event cannot be about `{name}`")]
    WrongRef { event: &'static str, name: RefName },
    #[error("`manifest_path` must be a path inside the repository, without `..`: `{0}`")]
    ManifestPath(String),
    #[error(transparent)]
    Manifest(#[from] ManifestErrors),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
}

/// Checks a request, reads what it leaves open from the repository, and plans.
pub async fn prepare(request: Request, repositories: &dyn Repositories) -> Result<NewPipeline, IntakeError> {
    let repository = RepositoryIdentity::of_url(&request.repo_url)?;
    repositories.check(&request.repo_url)?;
    let named: Option<RefName> = request.r#ref.as_deref().map(str::parse).transpose()?;
    let event = event_kind(&request, named.as_ref())?;
    let (r#ref, revision) = match &request.revision {
        Some(revision) => (named, revision.parse::<Revision>()?),
        None => {
            let (name, revision) = repositories.resolve(&request.repo_url, named.as_ref()).await?;
            (Some(name), revision)
        }
    };
    let path = request.manifest_path.as_deref().unwrap_or(DEFAULT_MANIFEST_PATH);
    let (manifest_name, text) = match request.body {
        Some(body) => (None, body.into_bytes()),
        None => {
            if !is_inner_path(path) {
                return Err(IntakeError::ManifestPath(path.chars().take(200).collect()));
            }
            let text = repositories.read(&request.repo_url, r#ref.as_ref(), &revision, path).await?;
            (Some(path.to_owned()), text)
        }
    };
    let name = manifest_name.as_deref().unwrap_or("manifest");
    let plan = manifest::parse(&ManifestSource { name, text: &text })?;
    let manifest = String::from_utf8_lossy(&text).into_owned();
    let which_manifest = match &manifest_name {
        Some(path) => format!("path:{path}"),
        None => format!("digest:{:x}", Sha256::digest(&text)),
    };
    let event = Event { kind: event, r#ref, revision };
    Ok(NewPipeline {
        identity: identity(&repository, &which_manifest, &event, request.request_id.as_deref()),
        repository: repository.to_string(),
        repository_url: request.repo_url,
        event: event.kind,
        r#ref: event.r#ref,
        revision: event.revision,
        manifest_path: manifest_name,
        manifest,
        plan,
    })
}

/// Push or tag follows from the ref (I4); what has a request id, or no ref, is by hand.
fn event_kind(request: &Request, named: Option<&RefName>) -> Result<EventKind, IntakeError> {
    let kind = match (request.event, named) {
        (Some(kind), _) => kind,
        (None, Some(name)) if request.request_id.is_none() => Event::kind_of_ref(name),
        (None, _) => EventKind::Manual,
    };
    match (kind, named) {
        (EventKind::Manual, _) if request.request_id.is_none() => Err(IntakeError::ManualWithoutId),
        (EventKind::Manual, _) => Ok(kind),
        (_, None) => Err(IntakeError::WithoutRef(kind.as_str())),
        (_, Some(name)) if Event::kind_of_ref(name) != kind => {
            Err(IntakeError::WrongRef { event: kind.as_str(), name: name.clone() })
        }
        _ => Ok(kind),
    }
}

/// The same text for the same event, by whatever road it comes (I4).
fn identity(
    repository: &RepositoryIdentity,
    manifest: &str,
    event: &Event,
    request_id: Option<&str>,
) -> String {
    let of_event = match (event.kind, request_id) {
        (EventKind::Manual, Some(request)) => format!("request:{request}"),
        _ => format!("{}\n{}", event.r#ref.as_ref().map_or("", RefName::as_str), event.revision),
    };
    format!("{repository}\n{manifest}\n{}\n{of_event}", event.kind.as_str())
}

fn is_inner_path(path: &str) -> bool {
    !path.is_empty()
        && path.len() <= 1024
        && !path.starts_with(['/', '-'])
        && !path.chars().any(char::is_control)
        && path.split('/').all(|part| !matches!(part, "" | "." | ".." | ".git"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = "name: x\nactions:\n  a:\n    commands: [true]\n";

    #[derive(Debug)]
    struct OneFile;

    #[async_trait]
    impl Repositories for OneFile {
        fn check(&self, _: &str) -> Result<(), RepositoryError> {
            Ok(())
        }

        async fn resolve(
            &self,
            _: &str,
            r#ref: Option<&RefName>,
        ) -> Result<(RefName, Revision), RepositoryError> {
            let main = "refs/heads/main".parse().unwrap();
            Ok((r#ref.cloned().unwrap_or(main), "b".repeat(40).parse().unwrap()))
        }

        async fn read(
            &self,
            _: &str,
            _: Option<&RefName>,
            _: &Revision,
            path: &str,
        ) -> Result<Vec<u8>, RepositoryError> {
            match path {
                DEFAULT_MANIFEST_PATH => Ok(MANIFEST.into()),
                _ => Err(RepositoryError::NotFound(format!("no {path}"))),
            }
        }
    }

    fn push() -> Request {
        Request {
            repo_url: "https://forge.example.org/o/r.git".into(),
            r#ref: Some("refs/heads/main".into()),
            revision: Some("a".repeat(40)),
            ..Request::default()
        }
    }

    async fn identity_of(request: Request) -> String {
        prepare(request, &OneFile).await.unwrap().identity
    }

    #[tokio::test]
    async fn the_same_event_by_another_road_has_the_same_identity() {
        let by_ssh = Request { repo_url: "git@forge.example.org:o/r".into(), ..push() };
        let said = Request { event: Some(EventKind::Push), ..push() };
        assert_eq!(identity_of(push()).await, identity_of(by_ssh).await);
        assert_eq!(identity_of(push()).await, identity_of(said).await);
    }

    #[tokio::test]
    async fn another_ref_revision_manifest_or_request_is_another_event() {
        let mut identities = vec![
            identity_of(push()).await,
            identity_of(Request { r#ref: Some("refs/heads/x".into()), ..push() }).await,
            identity_of(Request { r#ref: Some("refs/tags/main".into()), ..push() }).await,
            identity_of(Request { revision: Some("c".repeat(40)), ..push() }).await,
            identity_of(Request { body: Some(MANIFEST.into()), ..push() }).await,
            identity_of(Request { request_id: Some("1".into()), ..push() }).await,
            identity_of(Request { request_id: Some("2".into()), ..push() }).await,
        ];
        identities.sort();
        identities.dedup();
        assert_eq!(identities.len(), 7);
    }

    #[tokio::test]
    async fn what_is_left_open_is_read_from_the_repository() {
        let request =
            Request { repo_url: push().repo_url, request_id: Some("1".into()), ..Request::default() };
        let new = prepare(request, &OneFile).await.unwrap();
        assert_eq!(new.r#ref.unwrap().as_str(), "refs/heads/main");
        assert_eq!(new.revision.as_str(), "b".repeat(40));
        assert_eq!(new.manifest_path.as_deref(), Some(DEFAULT_MANIFEST_PATH));
    }

    #[tokio::test]
    async fn bad_requests_are_told_apart() {
        let bad = [
            (Request { repo_url: "nonsense".into(), ..push() }, "no repository URL"),
            (Request { r#ref: Some("main".into()), ..push() }, "not a full ref name"),
            (Request { revision: Some("HEAD".into()), ..push() }, "not a full commit id"),
            (Request { event: Some(EventKind::Tag), ..push() }, "cannot be about"),
            (Request { r#ref: None, ..push() }, "needs a request id"),
            (Request { r#ref: None, event: Some(EventKind::Push), ..push() }, "needs a `ref`"),
            (Request { manifest_path: Some("../x".into()), ..push() }, "inside the repository"),
            (Request { manifest_path: Some("other.yaml".into()), ..push() }, "no other.yaml"),
            (Request { body: Some("name: [".into()), ..push() }, "manifest:1"),
        ];
        for (request, expected) in bad {
            let error = prepare(request, &OneFile).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{error} does not say {expected}");
        }
    }
}
