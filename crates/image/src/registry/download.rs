//! Fetches a layer's blob into a file, goes on where an earlier try ended, and checks the whole against its digest.
//!
//! The file is the only state: its length says how much is there, its digest in the end whether it is right. A writer of its own,
//! on a blocking thread, hashes and writes behind a bounded channel.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::header::CONTENT_RANGE;
use reqwest::{Method, StatusCode};
use tokio::sync::mpsc;

use super::{Ask, Endpoint, Failure, RegistryClient, broken_off, with_attempts};
use crate::digest::{Digest, Hasher};
use crate::error::ImageError;
use crate::options::LEAST_BYTES;
use crate::reference::RegistryReference;

/// Chunks between the network and the disk.
const CHUNKS: usize = 32;
/// What makes up for the tries before it.
const PROGRESS_BYTES: u64 = 1 << 20;

/// What is to be fetched.
pub(crate) struct Blob<'a> {
    pub reference: &'a RegistryReference,
    pub digest: &'a Digest,
    pub bytes: u64,
    /// For messages: `layer 2 of 5`.
    pub what: &'a str,
}

/// A file that grows to be a blob; locked by whoever opened it.
#[derive(Debug)]
pub(crate) struct Partial {
    pub file: File,
    pub path: PathBuf,
    /// Whether the next one to fetch this blob finds it. One that it would not is removed in the end.
    pub is_shared: bool,
}

/// How far a file is.
struct Written {
    file: File,
    hasher: Hasher,
    bytes: u64,
}

impl RegistryClient {
    /// Fills the file. `told` hears of each chunk's size.
    pub async fn download(
        &self,
        blob: &Blob<'_>,
        partial: &Partial,
        told: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), ImageError> {
        let mut endpoints = self.endpoints(blob.reference)?.into_iter().peekable();
        loop {
            let Some(endpoint) = endpoints.next() else { return Err(ImageError::Closed) };
            match self.download_from(&endpoint, blob, partial, told).await {
                Err(error)
                    if endpoints.peek().is_some()
                        && !matches!(error, ImageError::DiskFull { .. } | ImageError::Storage { .. }) =>
                {
                    tracing::warn!(mirror = endpoint.name, error = %error, "a mirror does not help");
                }
                result => return result,
            }
        }
    }

    async fn download_from(
        &self,
        endpoint: &Endpoint,
        blob: &Blob<'_>,
        partial: &Partial,
        told: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), ImageError> {
        let mut tries = 1;
        let mut resumed = length(partial)?;
        loop {
            let before = length(partial)?;
            let failure = match self.attempt(endpoint, blob, partial, told).await {
                Ok(found) if found == *blob.digest => return Ok(()),
                Ok(found) => {
                    truncate(partial)?;
                    // What lay there from another time may have been the fault.
                    if std::mem::take(&mut resumed) > 0 {
                        continue;
                    }
                    return Err(ImageError::WrongDigest {
                        what: blob.what.to_owned(),
                        place: endpoint.name.clone(),
                        expected: blob.digest.clone(),
                        found,
                    });
                }
                Err(failure) => failure,
            };
            if length(partial)? >= before.saturating_add(PROGRESS_BYTES) {
                tries = 1;
            }
            match failure {
                Failure { error, again: Some(asked) } if tries <= self.timeouts.retries => {
                    tracing::debug!(error = %error, tries, "a layer is asked for again");
                    self.pause(tries, asked).await;
                    tries += 1;
                }
                Failure { error, .. } => return Err(with_attempts(error, tries)),
            }
        }
    }

    fn crawls(&self, endpoint: &Endpoint, what: &str) -> ImageError {
        ImageError::Crawls {
            registry: endpoint.name.clone(),
            what: what.to_owned(),
            least_bytes: LEAST_BYTES,
            within: self.timeouts.crawl,
            attempts: 1,
        }
    }

    /// One request, from where the file ends. Returns the digest of the whole file.
    async fn attempt(
        &self,
        endpoint: &Endpoint,
        blob: &Blob<'_>,
        partial: &Partial,
        told: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Digest, Failure> {
        let mut written = reopened(partial, blob.bytes).await.map_err(Failure::last)?;
        if written.bytes == blob.bytes {
            return Ok(written.hasher.finish());
        }
        let image = blob.reference.to_string();
        let mut ask = Ask::of(&image, blob.what, Method::GET, format!("blobs/{}", blob.digest));
        ask.from_byte = Some(written.bytes).filter(|bytes| *bytes > 0);
        let mut response = self.ask(endpoint, &ask).await?;
        let goes_on = response.status() == StatusCode::PARTIAL_CONTENT
            && starts_at(response.headers().get(CONTENT_RANGE)) == Some(written.bytes);
        if written.bytes > 0 && !goes_on {
            written.restart().map_err(|error| Failure::last(ImageError::disk(&partial.path, error)))?;
        }
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE
            || (response.status() == StatusCode::PARTIAL_CONTENT && !goes_on)
        {
            return Err(Failure::passing(broken_off(
                endpoint,
                blob.what,
                "it sends another part than asked for".to_owned(),
            )));
        }
        let mut left = blob.bytes - written.bytes;
        let (sender, chunks) = mpsc::channel(CHUNKS);
        let writer = tokio::task::spawn_blocking(move || written.write(chunks));
        let mut outcome = Ok(());
        let mut pace = Pace { since: Instant::now(), bytes: 0 };
        while left > 0 {
            match self.chunk(endpoint, blob.what, &mut response).await {
                Ok(Some(chunk)) if chunk.len() as u64 > left => {
                    let reason =
                        format!("it sends more than the {} bytes that the manifest names", blob.bytes);
                    outcome = Err(Failure::last(broken_off(endpoint, blob.what, reason)));
                    break;
                }
                Ok(Some(chunk)) => {
                    left -= chunk.len() as u64;
                    told(chunk.len() as u64);
                    if left > 0 && pace.is_too_slow(chunk.len() as u64, self.timeouts.crawl) {
                        // What came is kept: the next try goes on from there.
                        let _ = sender.send(chunk).await;
                        outcome = Err(Failure::passing(self.crawls(endpoint, blob.what)));
                        break;
                    }
                    if sender.send(chunk).await.is_err() {
                        break;
                    }
                }
                Ok(None) => {
                    let reason = format!("{left} of {} bytes are missing", blob.bytes);
                    outcome = Err(Failure::passing(broken_off(endpoint, blob.what, reason)));
                    break;
                }
                Err(failure) => {
                    outcome = Err(failure);
                    break;
                }
            }
        }
        drop(sender);
        let written = writer.await.map_err(|_| Failure::last(ImageError::Closed))?;
        let written = written.map_err(|error| Failure::last(ImageError::disk(&partial.path, error)))?;
        outcome.map(|()| written.hasher.finish())
    }
}

/// How fast a layer comes.
struct Pace {
    since: Instant,
    bytes: u64,
}

impl Pace {
    /// Takes note of what came; whether that was too little for too long. Writing to our own disk is in that time, and is
    /// faster on any disk.
    fn is_too_slow(&mut self, bytes: u64, crawl: Duration) -> bool {
        self.bytes += bytes;
        if self.bytes >= LEAST_BYTES {
            *self = Self { since: Instant::now(), bytes: 0 };
        }
        self.since.elapsed() >= crawl
    }
}

impl Written {
    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        (self.hasher, self.bytes) = (Hasher::new(), 0);
        Ok(())
    }

    fn write(mut self, mut chunks: mpsc::Receiver<Bytes>) -> io::Result<Self> {
        while let Some(chunk) = chunks.blocking_recv() {
            self.file.write_all(&chunk)?;
            self.hasher.update(&chunk);
            self.bytes += chunk.len() as u64;
        }
        Ok(self)
    }
}

/// Hashes what is there already.
async fn reopened(partial: &Partial, most: u64) -> Result<Written, ImageError> {
    let path = partial.path.clone();
    let file = partial.file.try_clone().map_err(|error| ImageError::disk(&path, error))?;
    let hashed = tokio::task::spawn_blocking(move || -> io::Result<Written> {
        let mut written = Written { file, hasher: Hasher::new(), bytes: 0 };
        written.file.seek(SeekFrom::Start(0))?;
        let mut buffer = vec![0; 256 << 10];
        loop {
            let count = written.file.read(&mut buffer)?;
            written.hasher.update(&buffer[..count]);
            written.bytes += count as u64;
            if written.bytes > most {
                written.restart()?;
            } else if count == 0 {
                return Ok(written);
            }
        }
    });
    let hashed = hashed.await.map_err(|_| ImageError::Closed)?;
    hashed.map_err(|error| ImageError::disk(&path, error))
}

fn length(partial: &Partial) -> Result<u64, ImageError> {
    let metadata = partial.file.metadata().map_err(|error| ImageError::disk(&partial.path, error))?;
    Ok(metadata.len())
}

fn truncate(partial: &Partial) -> Result<(), ImageError> {
    partial.file.set_len(0).map_err(|error| ImageError::disk(&partial.path, error))
}

/// `bytes 100-199/200` → 100.
fn starts_at(header: Option<&reqwest::header::HeaderValue>) -> Option<u64> {
    header?.to_str().ok()?.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

impl Partial {
    /// Gives its room back.
    pub fn discard(&self) {
        let _ = self.file.set_len(0);
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.is_shared {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
