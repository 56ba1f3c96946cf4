//! Keeps the store within its budget: what was used longest ago goes first, what is in use stays.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::SystemTime;

use super::files::{Files, Record, named_digest};
use crate::digest::Digest;
use crate::error::ImageError;

/// What a collection did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Collected {
    pub images: u64,
    pub layers: u64,
    pub freed_bytes: u64,
    /// Of the layers that are left.
    pub kept_bytes: u64,
}

struct Layer {
    path: PathBuf,
    bytes: u64,
    changed: SystemTime,
    /// Records that name it.
    users: usize,
}

/// Of all layers, and whether that is more than may be.
pub(super) fn size(files: &Files) -> u64 {
    files.layers().iter().filter_map(|path| Some(files.facts(path)?.disk_bytes)).sum()
}

pub(super) fn collect(files: &Files, budget_bytes: u64) -> Result<Collected, ImageError> {
    files.sweep();
    let mut records = files.records();
    records.sort_by_key(|(_, used, _)| *used);
    let mut layers = layers(files, &records);
    let mut collected =
        Collected { kept_bytes: layers.values().map(|layer| layer.bytes).sum(), ..Collected::default() };

    // First what no image needs any more: the rest of a pull that ended early, the oldest first.
    let mut orphans: Vec<_> = layers
        .iter()
        .filter(|(_, layer)| layer.users == 0)
        .map(|(id, layer)| (layer.changed, id.clone()))
        .collect();
    orphans.sort();
    for (_, id) in orphans {
        if collected.kept_bytes <= budget_bytes {
            break;
        }
        remove(files, &mut layers, &id, &mut collected)?;
    }
    let mut needed = HashSet::new();
    for (path, _, record) in records {
        let goes = collected.kept_bytes > budget_bytes
            && forget(files, &mut layers, &record, &path, &mut collected)?;
        if !goes {
            needed.extend(record.blobs);
        }
    }
    files.sweep_blobs(&needed);
    Ok(collected)
}

fn layers(files: &Files, records: &[(PathBuf, SystemTime, Record)]) -> HashMap<Digest, Layer> {
    let mut users: HashMap<&Digest, usize> = HashMap::new();
    for (_, _, record) in records {
        let distinct: HashSet<_> = record.layers.iter().collect();
        distinct.into_iter().for_each(|id| *users.entry(id).or_default() += 1);
    }
    let read = |path: PathBuf| {
        let id = named_digest(&path)?;
        let changed = std::fs::metadata(&path).and_then(|metadata| metadata.modified()).ok()?;
        // One that is not to be believed takes room as well; how much, nobody knows.
        let bytes = files.facts(&path).map_or(0, |facts| facts.disk_bytes);
        let users = users.get(&id).copied().unwrap_or_default();
        Some((id, Layer { path, bytes, changed, users }))
    };
    files.layers().into_iter().filter_map(read).collect()
}

/// Gives up an image: its record, and the layers that no other needs. False if all of these are in use.
fn forget(
    files: &Files,
    layers: &mut HashMap<Digest, Layer>,
    record: &Record,
    path: &PathBuf,
    collected: &mut Collected,
) -> Result<bool, ImageError> {
    let own: HashSet<_> = record.layers.iter().collect();
    let own: Vec<_> =
        own.into_iter().filter(|id| layers.get(id).is_some_and(|layer| layer.users == 1)).cloned().collect();
    let mut removed = false;
    for id in &own {
        removed |= remove(files, layers, id, collected)?;
    }
    if !removed && !own.is_empty() {
        return Ok(false);
    }
    // Without one of its layers it is not whole; should it be asked for again, only what is missing is fetched.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(ImageError::disk(path, error));
        }
        _ => collected.images += 1,
    }
    for id in &record.layers {
        if let Some(layer) = layers.get_mut(id) {
            layer.users = layer.users.saturating_sub(1);
        }
    }
    Ok(true)
}

fn remove(
    files: &Files,
    layers: &mut HashMap<Digest, Layer>,
    id: &Digest,
    collected: &mut Collected,
) -> Result<bool, ImageError> {
    let Some(layer) = layers.get(id) else { return Ok(false) };
    let removed = files.remove_layer(&layer.path).map_err(|error| ImageError::disk(&layer.path, error))?;
    if removed {
        collected.layers += 1;
        collected.freed_bytes += layer.bytes;
        collected.kept_bytes -= layer.bytes;
        layers.remove(id);
    }
    Ok(removed)
}
