//! Takes bytes in: straight through to the object store, hashed on the way, and kept only if they are what they should be.

use std::fmt;
use std::pin::Pin;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::objects::Upload;
use super::{Inner, Storage, StorageError, Visitor};
use crate::store::entity::storage::blobs;

/// An upload from which nothing comes for so long has broken off.
const SILENCE: Duration = Duration::from_secs(60);
/// An upload ends before what it has written could be taken for a broken one's, which is after a day.
pub(super) const LONGEST: Duration = Duration::from_secs(6 * 60 * 60);
/// A body that is not needed is read up to here, so that its sender comes to read the answer.
const READ_UNUSED_BYTES: u64 = 64 << 20;

/// A digest as the API has it: `sha256:` and 64 hexadecimal digits in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobDigest(String);

const ALGORITHM: &str = "sha256:";

/// A text is no digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a digest is `sha256:` and 64 hexadecimal digits in lower case")]
pub struct InvalidDigest;

impl FromStr for BlobDigest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        let hex = text.strip_prefix(ALGORITHM).filter(|hex| hex.len() == 64 && hex.bytes().all(is_digit));
        hex.map(|_| Self(text.to_owned())).ok_or(InvalidDigest)
    }
}

impl fmt::Display for BlobDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl BlobDigest {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(super) fn of(hash: Sha256) -> Self {
        Self(hash.finalize().iter().fold(ALGORITHM.to_owned(), |text, byte| format!("{text}{byte:02x}")))
    }

    /// A new name for an object with these bytes.
    fn object(&self) -> String {
        let hex = &self.0[ALGORITHM.len()..];
        format!("sha256/{}/{}.{}", &hex[..2], &hex[2..], Uuid::now_v7().simple())
    }
}

/// Whether bytes were brought now, or stood already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Brought {
    Now { size_bytes: u64 },
    Before { size_bytes: u64 },
}

type Body = Pin<Box<dyn Stream<Item = Result<Bytes, String>> + Send>>;

impl Storage {
    /// Takes an upload. It goes on, and cleans up after itself, when the caller has gone.
    pub async fn upload<E: fmt::Display>(
        &self,
        visitor: &Visitor,
        digest: BlobDigest,
        length: u64,
        body: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    ) -> Result<Brought, StorageError> {
        let max = self.0.config.max_upload_bytes;
        if length > max {
            return Err(StorageError::TooLarge { length, max });
        }
        let body: Body = Box::pin(body.map(|piece| piece.map_err(|error| error.to_string())));
        let (inner, owner) = (self.0.clone(), visitor.owner());
        let permit = self.0.uploads.clone().acquire_owned().await.map_err(|_| StorageError::ShuttingDown)?;
        let taking = self.0.tasks.spawn(async move {
            let _permit = permit;
            let taking = tokio::time::timeout(LONGEST, inner.take(&owner, &digest, length, body));
            match inner.stop.run_until_cancelled(taking).await {
                Some(Ok(took)) => took,
                Some(Err(_)) => Err(StorageError::BrokenOff("it took too long".into())),
                None => Err(StorageError::ShuttingDown),
            }
        });
        taking.await.map_err(|_| StorageError::ShuttingDown)?
    }
}

impl Inner {
    async fn take(
        &self,
        owner: &str,
        digest: &BlobDigest,
        length: u64,
        mut body: Body,
    ) -> Result<Brought, StorageError> {
        let (mut stands, mut lost) = (false, None);
        if let Some(blob) = self.store.blob(digest.as_str()).await? {
            stands = self.objects.has(&blob.object).await?;
            lost = Some(blob.object).filter(|_| !stands);
        }
        if stands && let Some(blob) = self.store.touch_owned(digest.as_str(), owner, now_ms()).await? {
            read_unused(&mut body, length).await;
            return Ok(Brought::Before { size_bytes: blob.size_bytes.unsigned_abs() });
        }
        if stands {
            // Others have brought it: these prove that they have it, and nothing is stored twice.
            self.check(&mut body, digest, length, None).await?;
            if self.store.add_owner(digest.as_str(), owner, now_ms()).await? {
                return Ok(Brought::Now { size_bytes: length });
            }
            return Err(StorageError::NotUploaded { digest: digest.to_string() });
        }
        let object = digest.object();
        self.store.add_loose(&object, now_ms()).await?;
        let mut multipart = None;
        let written = self.write(&object, &mut multipart, &mut body, digest, length).await;
        let kept = match written {
            Ok(()) => self.keep(owner, digest, (&object, lost.as_deref()), length).await,
            Err(error) => Err(error),
        };
        if !matches!(kept, Ok(true)) {
            self.clear(&object, multipart.as_deref()).await;
        }
        kept.map(|_| Brought::Now { size_bytes: length })
    }

    async fn write(
        &self,
        object: &str,
        multipart: &mut Option<String>,
        body: &mut Body,
        digest: &BlobDigest,
        length: u64,
    ) -> Result<(), StorageError> {
        let mut upload = self.objects.begin(object, length).await?;
        if let Some(name) = upload.multipart() {
            *multipart = Some(name.to_owned());
            self.store.name_multipart(object, name).await?;
        }
        self.check(body, digest, length, Some(&mut upload)).await?;
        Ok(upload.finish().await?)
    }

    /// Reads a body to its end, and whether it is what it should be.
    async fn check(
        &self,
        body: &mut Body,
        digest: &BlobDigest,
        length: u64,
        mut upload: Option<&mut Upload>,
    ) -> Result<(), StorageError> {
        let (mut hash, mut came) = (Sha256::new(), 0_u64);
        let broken = |why: &str| StorageError::BrokenOff(why.to_owned());
        loop {
            let next = tokio::time::timeout(SILENCE, body.next()).await;
            let Some(piece) = next.map_err(|_| broken("nothing came for a minute"))? else { break };
            let piece = piece.map_err(StorageError::BrokenOff)?;
            came += piece.len() as u64;
            if came > length {
                return Err(broken("it is longer than it said"));
            }
            hash.update(&piece);
            if let Some(upload) = &mut upload {
                upload.write(&piece).await?;
            }
        }
        if came < length {
            return Err(broken("it is shorter than it said"));
        }
        let found = BlobDigest::of(hash);
        if found != *digest {
            return Err(StorageError::WrongDigest { found: found.to_string() });
        }
        Ok(())
    }

    /// Makes the object the digest's, in the place of the lost one if there is that; false if another upload of the same bytes was
    /// first.
    async fn keep(
        &self,
        owner: &str,
        digest: &BlobDigest,
        (object, lost): (&str, Option<&str>),
        length: u64,
    ) -> Result<bool, StorageError> {
        let now_ms = now_ms();
        let blob = blobs::Model {
            digest: digest.to_string(),
            object: object.to_owned(),
            size_bytes: i64::try_from(length).unwrap_or(i64::MAX),
            created_at: now_ms,
            touched_at: now_ms,
        };
        Ok(self.store.keep_blob(blob, lost, owner).await?)
    }

    /// Deletes what is of no use. What cannot be deleted now is found later.
    pub(super) async fn clear(&self, object: &str, multipart: Option<&str>) {
        // A commit whose answer was lost may have kept it after all.
        let is_loose = self.store.is_loose(object).await;
        let cleared = match is_loose {
            Ok(true) => match self.objects.delete(object, multipart).await {
                Ok(()) => self.store.drop_loose(object).await.map_err(StorageError::from),
                Err(error) => Err(error.into()),
            },
            Ok(false) => Ok(()),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = cleared {
            tracing::warn!(object, %error, "what an upload left is deleted later");
        }
    }
}

async fn read_unused(body: &mut Body, length: u64) {
    if length > READ_UNUSED_BYTES {
        return;
    }
    let mut left = length;
    while let Ok(Some(Ok(piece))) = tokio::time::timeout(SILENCE, body.next()).await {
        left = left.saturating_sub(piece.len() as u64);
        if left == 0 {
            return;
        }
    }
}

/// The wall clock, by which things expire.
pub(super) fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}
