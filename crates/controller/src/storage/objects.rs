//! Keeps bytes under names: in a folder, or in a bucket of an S3 server.
//!
//! What is written has a name of its own, so that nothing is ever written over, and appears whole or not at all.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path as FsPath, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientConfigKey, GetOptions, GetRange, MultipartUpload, ObjectStore, ObjectStoreExt,
    PutPayload, RetryConfig,
};
use sealci_service::problem::chain;

/// What is sent at once, and so what an upload takes of the memory. An S3 server wants at least 5 MiB, and takes at most
/// 10,000 parts.
const PART_BYTES: usize = 8 << 20;
const MAX_PARTS: u64 = 10_000;

/// One request that writes may take so long. Reads end when nothing comes for [`READ_TIMEOUT`].
const WRITE_TIMEOUT: Duration = Duration::from_secs(120);
const READ_TIMEOUT: &str = "30 seconds";
const CONNECT_TIMEOUT: &str = "5 seconds";
const RETRIES: usize = 3;
const RETRY_FOR: Duration = Duration::from_secs(15);

/// Where objects are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ObjectsLocation {
    Folder(PathBuf),
    S3 { bucket: String, prefix: String },
}

/// Why a text names no place for objects.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no place for objects: give a folder's path, or s3://bucket/prefix")]
pub struct InvalidLocation(String);

impl FromStr for ObjectsLocation {
    type Err = InvalidLocation;

    fn from_str(text: &str) -> Result<Self, InvalidLocation> {
        if let Some(rest) = text.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let prefix = prefix.trim_matches('/');
            if bucket.is_empty() || Path::parse(prefix).is_err() {
                return Err(InvalidLocation(text.to_owned()));
            }
            return Ok(Self::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() });
        }
        if text.is_empty() || text.contains("://") {
            return Err(InvalidLocation(text.to_owned()));
        }
        Ok(Self::Folder(text.into()))
    }
}

impl fmt::Display for ObjectsLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => write!(f, "{}", path.display()),
            Self::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
        }
    }
}

/// A place for objects, with what opens it. `Debug` does not show the keys.
#[derive(Clone)]
pub struct ObjectsConfig {
    pub location: ObjectsLocation,
    /// The usual `AWS_*` variables, by their names.
    pub aws: BTreeMap<String, String>,
}

impl fmt::Debug for ObjectsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectsConfig").field("location", &self.location).finish_non_exhaustive()
    }
}

/// What went wrong with the objects.
#[derive(Debug, thiserror::Error)]
pub enum ObjectsError {
    #[error("the place for objects {location} cannot be used: {reason}")]
    Open { location: ObjectsLocation, reason: String },
    #[error("the object store has no room left")]
    Full(#[source] object_store::Error),
    #[error("the object store has lost the object {0}")]
    Missing(String),
    #[error("the object store has another object {object} than was written: it is damaged")]
    Damaged { object: String },
    #[error("the object store does not answer as it should: {}", chain(.0))]
    Down(#[source] object_store::Error),
    #[error("the object store took longer than {} s", WRITE_TIMEOUT.as_secs())]
    Slow,
}

impl From<object_store::Error> for ObjectsError {
    fn from(error: object_store::Error) -> Self {
        match error {
            object_store::Error::NotFound { path, .. } => Self::Missing(path),
            error if is_full(&error) => Self::Full(error),
            error => Self::Down(error),
        }
    }
}

fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<std::io::Error>()
            && matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
        {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The open place. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    Folder(PathBuf),
    /// Uploads in parts have names there, by which they can be ended after a crash.
    Parts(Arc<dyn MultipartStore>),
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Folder(_) => "Folder",
            Self::Parts(_) => "Parts",
        })
    }
}

/// What is read of an object.
pub struct Bytestream {
    pub stream: BoxStream<'static, Result<Bytes, ObjectsError>>,
}

impl Objects {
    /// Opens the place. An S3 server is not asked yet: it may be away now and come back.
    pub fn open(config: &ObjectsConfig) -> Result<Self, ObjectsError> {
        let refuse = |reason: String| ObjectsError::Open { location: config.location.clone(), reason };
        match &config.location {
            ObjectsLocation::Folder(path) => {
                make_private_folder(path).map_err(|error| refuse(error.to_string()))?;
                let path = path.canonicalize().map_err(|error| refuse(error.to_string()))?;
                let store = LocalFileSystem::new_with_prefix(&path).map_err(|error| refuse(chain(&error)))?;
                let store = Arc::new(store.with_fsync(true));
                Ok(Self { store, prefix: Path::default(), kind: Kind::Folder(path) })
            }
            ObjectsLocation::S3 { bucket, prefix } => {
                let timeouts = [
                    (ClientConfigKey::ConnectTimeout, CONNECT_TIMEOUT),
                    (ClientConfigKey::ReadTimeout, READ_TIMEOUT),
                    // A large object takes as long as it takes; what does not move is noticed by the other two.
                    (ClientConfigKey::Timeout, "1 day"),
                ];
                let backoff =
                    BackoffConfig { max_backoff: Duration::from_secs(3), ..BackoffConfig::default() };
                let retry = RetryConfig { backoff, max_retries: RETRIES, retry_timeout: RETRY_FOR };
                let mut builder = AmazonS3Builder::new().with_retry(retry);
                for (key, value) in timeouts {
                    builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
                }
                for (name, value) in &config.aws {
                    if let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
                        builder = builder.with_config(key, value);
                    }
                }
                let store =
                    builder.with_bucket_name(bucket).build().map_err(|error| refuse(chain(&error)))?;
                let store = Arc::new(store);
                let prefix = Path::parse(prefix).map_err(|error| refuse(chain(&error)))?;
                Ok(Self { store: store.clone(), prefix, kind: Kind::Parts(store) })
            }
        }
    }

    fn path(&self, name: &str) -> Path {
        name.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }

    /// Begins an object of at most this many bytes.
    pub async fn begin(&self, name: &str, size_bytes: u64) -> Result<Upload, ObjectsError> {
        let path = self.path(name);
        let part_bytes =
            PART_BYTES.max(usize::try_from(size_bytes.div_ceil(MAX_PARTS)).unwrap_or(usize::MAX));
        let sink = match &self.kind {
            _ if size_bytes <= part_bytes as u64 => Sink::Once,
            Kind::Folder(_) => Sink::File(timely(self.store.put_multipart(&path)).await?),
            Kind::Parts(store) => {
                let id = timely(store.create_multipart(&path)).await?;
                Sink::Parts { store: store.clone(), id, parts: Vec::new() }
            }
        };
        Ok(Upload { store: self.store.clone(), path, part_bytes, buffer: Vec::new(), sink })
    }

    /// Whether the object is there. One that nobody but us deletes may be gone all the same.
    pub async fn has(&self, name: &str) -> Result<bool, ObjectsError> {
        Ok(self.size(name).await?.is_some())
    }

    /// How many bytes the object has; none if it is not there.
    pub async fn size(&self, name: &str) -> Result<Option<u64>, ObjectsError> {
        match timely(self.store.head(&self.path(name))).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(ObjectsError::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The bytes of a range of an object that had so many bytes when it was written.
    pub async fn read(
        &self,
        name: &str,
        size_bytes: u64,
        range: Range<u64>,
    ) -> Result<Bytestream, ObjectsError> {
        if range.is_empty() {
            return Ok(Bytestream { stream: futures_util::stream::empty().boxed() });
        }
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
        let got = match self.store.get_opts(&self.path(name), options).await.map_err(ObjectsError::from) {
            // A range behind the end of what was cut is refused in words only.
            Err(ObjectsError::Down(error)) => {
                let size = self.size(name).await;
                return Err(match size {
                    Ok(Some(size)) if size != size_bytes => ObjectsError::Damaged { object: name.to_owned() },
                    _ => ObjectsError::Down(error),
                });
            }
            got => got?,
        };
        if got.meta.size != size_bytes {
            return Err(ObjectsError::Damaged { object: name.to_owned() });
        }
        Ok(Bytestream { stream: got.into_stream().map_err(ObjectsError::from).boxed() })
    }

    /// The bytes of a range at once; for small ones.
    pub async fn read_whole(
        &self,
        name: &str,
        size_bytes: u64,
        range: Range<u64>,
    ) -> Result<Vec<u8>, ObjectsError> {
        let read = self.read(name, size_bytes, range).await?;
        read.stream
            .try_fold(Vec::new(), async |mut all, bytes| {
                Ok({
                    all.extend_from_slice(&bytes);
                    all
                })
            })
            .await
    }

    /// Deletes an object, or what a broken upload left of it. It may be gone already.
    pub async fn delete(&self, name: &str, multipart: Option<&str>) -> Result<(), ObjectsError> {
        let path = self.path(name);
        match (&self.kind, multipart) {
            (Kind::Parts(store), Some(id)) => {
                gone(timely(store.abort_multipart(&path, &id.to_owned())).await)?;
            }
            (Kind::Folder(root), _) => remove_unfinished(root.join(path.as_ref())).await?,
            (Kind::Parts(_), None) => {}
        }
        gone(timely(self.store.delete(&path)).await)
    }
}

/// What is not there is as good as deleted.
fn gone(deleted: Result<(), ObjectsError>) -> Result<(), ObjectsError> {
    match deleted {
        Err(ObjectsError::Missing(_)) => Ok(()),
        other => other,
    }
}

async fn timely<T>(request: impl Future<Output = object_store::Result<T>>) -> Result<T, ObjectsError> {
    Ok(tokio::time::timeout(WRITE_TIMEOUT, request).await.map_err(|_| ObjectsError::Slow)??)
}

fn make_private_folder(path: &FsPath) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// A file that is being written is called as it will be, with `#` and a number behind it.
async fn remove_unfinished(file: PathBuf) -> Result<(), ObjectsError> {
    let work = tokio::task::spawn_blocking(move || {
        let (Some(folder), Some(name)) = (file.parent(), file.file_name()) else { return Ok(()) };
        let unfinished = format!("{}#", name.to_string_lossy());
        let entries = match std::fs::read_dir(folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&unfinished) {
                match std::fs::remove_file(entry.path()) {
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {} // by the upload itself
                    removed => removed?,
                }
            }
        }
        Ok(())
    });
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| object_store::Error::Generic {
        store: "folder",
        source,
    };
    work.await
        .map_err(|error| failed(error.into()))?
        .map_err(|error: std::io::Error| failed(error.into()).into())
}

/// An object that is being written. Dropped, it leaves at most an upload in parts that [`Objects::delete`] ends.
pub struct Upload {
    store: Arc<dyn ObjectStore>,
    path: Path,
    part_bytes: usize,
    buffer: Vec<u8>,
    sink: Sink,
}

enum Sink {
    /// It fits into one request.
    Once,
    File(Box<dyn MultipartUpload>),
    Parts {
        store: Arc<dyn MultipartStore>,
        id: String,
        parts: Vec<PartId>,
    },
}

impl fmt::Debug for Upload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upload").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Upload {
    /// The name of the upload in parts, by which it can be ended after a crash.
    pub fn multipart(&self) -> Option<&str> {
        match &self.sink {
            Sink::Parts { id, .. } => Some(id),
            Sink::Once | Sink::File(_) => None,
        }
    }

    /// Takes the next bytes; at most one part of them is in memory.
    pub async fn write(&mut self, mut bytes: &[u8]) -> Result<(), ObjectsError> {
        while !bytes.is_empty() {
            let taken = bytes.len().min(self.part_bytes - self.buffer.len());
            self.buffer.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            // The last part is sent by `finish`, which sends one of any size.
            if self.buffer.len() == self.part_bytes && !matches!(self.sink, Sink::Once) {
                self.send_part().await?;
            }
        }
        Ok(())
    }

    async fn send_part(&mut self) -> Result<(), ObjectsError> {
        let part = PutPayload::from(std::mem::take(&mut self.buffer));
        match &mut self.sink {
            Sink::Once => {}
            Sink::File(file) => timely(file.put_part(part)).await?,
            Sink::Parts { store, id, parts } => {
                parts.push(timely(store.put_part(&self.path, id, parts.len(), part)).await?);
            }
        }
        Ok(())
    }

    /// The object is there when this returns.
    pub async fn finish(mut self) -> Result<(), ObjectsError> {
        if !self.buffer.is_empty() && !matches!(self.sink, Sink::Once) {
            self.send_part().await?;
        }
        match self.sink {
            Sink::Once => {
                timely(self.store.put(&self.path, PutPayload::from(self.buffer))).await?;
            }
            Sink::File(mut file) => {
                timely(file.complete()).await?;
            }
            Sink::Parts { store, id, parts } => {
                timely(store.complete_multipart(&self.path, &id, parts)).await?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let s3 = |bucket: &str, prefix: &str| {
            Ok(ObjectsLocation::S3 { bucket: bucket.into(), prefix: prefix.into() })
        };
        assert_eq!("s3://b".parse(), s3("b", ""));
        assert_eq!("s3://b/a/c/".parse(), s3("b", "a/c"));
        assert_eq!("/srv/x".parse(), Ok(ObjectsLocation::Folder("/srv/x".into())));
        for bad in ["", "s3://", "s3:///x", "gs://b", "https://h/x", "s3://b/../x"] {
            assert!(bad.parse::<ObjectsLocation>().is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn an_upload_appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let location = ObjectsLocation::Folder(folder.path().join("objects"));
        let objects = Objects::open(&ObjectsConfig { location, aws: BTreeMap::new() }).unwrap();
        let files = || {
            let walk =
                std::process::Command::new("find").arg(folder.path()).args(["-type", "f"]).output().unwrap();
            String::from_utf8(walk.stdout).unwrap().lines().count()
        };
        let bytes: Vec<u8> = (0..PART_BYTES + 1000).map(|n| (n % 251) as u8).collect();
        for length in [0, 10, PART_BYTES, PART_BYTES + 1000] {
            let name = format!("sha256/ab/{length}");
            let mut upload = objects.begin(&name, length as u64).await.unwrap();
            for piece in bytes[..length].chunks(1 << 20) {
                upload.write(piece).await.unwrap();
            }
            assert!(objects.read_whole(&name, length as u64, 0..1).await.is_err() || length == 0);
            upload.finish().await.unwrap();
            let read = objects.read_whole(&name, length as u64, 3..length as u64).await.unwrap_or_default();
            assert!(read == bytes[3.min(length)..length], "{length}");
        }
        assert_eq!(files(), 4);
        let mut broken = objects.begin("sha256/ab/broken", 20 << 20).await.unwrap();
        broken.write(&bytes).await.unwrap();
        assert_eq!(files(), 5);
        std::mem::forget(broken); // a crash
        objects.delete("sha256/ab/broken", None).await.unwrap();
        objects.delete("sha256/ab/10", None).await.unwrap();
        objects.delete("sha256/ab/10", None).await.unwrap();
        assert_eq!(files(), 3);
        assert!(matches!(objects.read_whole("sha256/ab/10", 1, 0..1).await, Err(ObjectsError::Missing(_))));
    }
}
