//! Gives bytes out: of blobs, and of single files in archives.

use std::ops::Range;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use sealci_archive::{
    Entry, EntryKind, Extractor, Index, IndexError, Progress, Tail, read_index, relative_name,
};

use sha2::{Digest, Sha256};

use super::objects::ObjectsError;
use super::upload::BlobDigest;
use super::{Storage, StorageError};
use crate::store::entity::storage::blobs;

/// The index of most archives is in the last so many bytes.
const TAIL_BYTES: u64 = 64 << 10;
/// A file is given out in pieces of so many bytes.
const PIECE_BYTES: usize = 64 << 10;

/// Bytes on their way out.
pub type Contents = BoxStream<'static, Result<Bytes, StorageError>>;

impl Storage {
    /// The bytes of a blob's range. Those of all of it are checked on their way, so that what is damaged is offered once at most;
    /// whoever reads it knows its digest.
    pub async fn read(&self, blob: &blobs::Model, range: Range<u64>) -> Result<Contents, StorageError> {
        let size = blob.size_bytes.unsigned_abs();
        let is_whole = range == (0..size);
        let read = self.0.objects.read(&blob.object, size, range).await;
        let contents = self.found(blob, read).await?.stream.map_err(StorageError::from).boxed();
        Ok(if is_whole { self.clone().checked(blob.clone(), contents) } else { contents })
    }

    /// Judges with the last of the bytes: nobody waits for more behind them.
    fn checked(self, blob: blobs::Model, contents: Contents) -> Contents {
        let start = (self, blob, Sha256::new(), 0, contents);
        let stream = futures_util::stream::try_unfold(start, async |state| {
            let (storage, blob, mut hash, mut count, mut contents) = state;
            let Some(bytes) = contents.try_next().await? else { return Ok(None) };
            hash.update(&bytes);
            count += bytes.len() as u64;
            if count >= blob.size_bytes.unsigned_abs() && BlobDigest::of(hash.clone()).as_str() != blob.digest
            {
                let damaged = ObjectsError::Damaged { object: blob.object.clone() };
                // What matters has been done.
                let _ = storage.found(&blob, Err::<(), _>(damaged)).await;
            }
            Ok(Some((bytes, (storage, blob, hash, count, contents))))
        });
        stream.boxed()
    }

    /// What was read of a blob. Where its object is gone or damaged, no cache offers it any more.
    async fn found<T>(&self, blob: &blobs::Model, read: Result<T, ObjectsError>) -> Result<T, StorageError> {
        let how = match read {
            Err(ObjectsError::Missing(_)) => "gone from",
            Err(ObjectsError::Damaged { .. }) => "damaged in",
            read => return Ok(read?),
        };
        let entries = self.0.store.delete_caches_of(&blob.digest).await?;
        tracing::error!(
            object = blob.object,
            cache.entries = entries,
            how,
            "an object is not what was written"
        );
        let place = self.0.config.objects.location.clone();
        Err(StorageError::Lost { how, object: blob.object.clone(), place })
    }

    /// What is in an archive, checked.
    pub async fn index(&self, blob: &blobs::Model) -> Result<Index, StorageError> {
        let _permit = self.0.indexes.acquire().await.map_err(|_| StorageError::ShuttingDown)?;
        let size = blob.size_bytes.unsigned_abs();
        let mut wanted = TAIL_BYTES.min(size);
        loop {
            let tail = self.0.objects.read_whole(&blob.object, size, size - wanted..size).await;
            let tail = self.found(blob, tail).await?;
            let reading = tokio::task::spawn_blocking(move || read_index(&tail, size));
            match reading.await.map_err(|_| StorageError::ShuttingDown)?? {
                Tail::Index(index) => return Ok(index),
                Tail::Needs(bytes) if bytes > wanted && bytes <= size => wanted = bytes,
                Tail::Needs(_) => return Err(IndexError::NotThere.into()),
            }
        }
    }

    /// One file's length and contents; of a hard link, those of what it links to.
    pub async fn file(&self, blob: &blobs::Model, path: &str) -> Result<(u64, Contents), StorageError> {
        let index = self.index(blob).await?;
        let wanted = relative_name(path).ok_or(StorageError::NoSuchFile)?;
        let mut entry = index.entry(&wanted).ok_or(StorageError::NoSuchFile)?;
        if let (EntryKind::Hardlink, Some(target)) = (entry.kind, &entry.target) {
            let target = relative_name(target).ok_or(StorageError::NoSuchFile)?;
            entry = index.entry(&target).ok_or(StorageError::NoSuchFile)?;
        }
        if entry.kind != EntryKind::File {
            return Err(StorageError::NoContents { path: wanted, kind: entry.kind.as_str() });
        }
        let frame = entry.frame.offset..entry.frame.offset + entry.frame.length;
        let packed = if entry.size_bytes == 0 { 0..0 } else { frame };
        let packed = self.read(blob, packed).await?;
        Ok((entry.size_bytes, unpacked(entry, packed)?))
    }
}

fn unpacked(entry: &Entry, packed: Contents) -> Result<Contents, StorageError> {
    let start = (Extractor::new(entry)?, packed);
    let stream = futures_util::stream::try_unfold(start, |(mut extractor, mut packed)| async move {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            match extractor.read(&mut piece)? {
                Progress::Wrote(length) => {
                    piece.truncate(length);
                    return Ok(Some((Bytes::from(piece), (extractor, packed))));
                }
                Progress::Done => return Ok(None),
                Progress::NeedsInput => match packed.try_next().await? {
                    Some(bytes) => extractor.feed(&bytes),
                    None => {
                        extractor.input_ended()?;
                        return Ok(None);
                    }
                },
            }
        }
    });
    Ok(stream.boxed())
}
