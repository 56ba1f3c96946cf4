//! Reads the paths in a layer: what they name, what they hide, and which are refused.
//!
//! Pure: whether a path's folders are links is the kernel's business (tree.rs).

use super::{UnpackError, shown};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// linux/limits.h.
pub(super) const PATH_BYTES: usize = 4095;
pub(super) const NAME_BYTES: usize = 255;

/// One place in the tree: the folder and the name in it. Both empty for the root.
pub(super) struct Place<'a> {
    pub folder: &'a [u8],
    pub name: &'a [u8],
}

impl Place<'_> {
    pub fn path(&self) -> Vec<u8> {
        if self.folder.is_empty() { self.name.to_vec() } else { [self.folder, b"/", self.name].concat() }
    }
}

pub(super) enum Whiteout<'a> {
    /// Of the layers below, this name is hidden.
    Of(&'a [u8]),
    /// Of the layers below, the folder's content is hidden.
    Opaque,
    /// Bookkeeping of AUFS, which made layers once.
    Ignored,
}

pub(super) fn whiteout<'a>(path: &[u8], place: &Place<'a>) -> Result<Option<Whiteout<'a>>, UnpackError> {
    let mut above = place.folder.split(|byte| *byte == b'/');
    match above.find(|part| part.starts_with(WHITEOUT)) {
        Some(part) if part.starts_with(b".wh..wh.") => return Ok(Some(Whiteout::Ignored)),
        Some(_) => return Err(refused(path, "it lies in a whiteout")),
        None => {}
    }
    let Some(name) = place.name.strip_prefix(WHITEOUT) else { return Ok(None) };
    Ok(Some(match name {
        _ if place.name == OPAQUE => Whiteout::Opaque,
        _ if name.starts_with(WHITEOUT) => Whiteout::Ignored,
        b"" | b"." | b".." => return Err(refused(path, "it is a whiteout of no name")),
        name => Whiteout::Of(name),
    }))
}

/// `./usr//bin/` → `usr/bin`. A leading slash is the layer's root; `..` is refused, for nothing honest has it.
pub(super) fn clean(path: &[u8], depth: usize) -> Result<Vec<u8>, UnpackError> {
    if path.is_empty() {
        return Err(refused(path, "it has no name"));
    }
    let mut clean = Vec::with_capacity(path.len());
    let parts = path.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b"."));
    for (index, part) in parts.enumerate() {
        if part == b".." {
            return Err(refused(path, "its path has `..` in it"));
        }
        if part.contains(&0) {
            return Err(refused(path, "its path has a zero byte in it"));
        }
        // A whiteout's name is shorter than the one it hides.
        if part.len() > NAME_BYTES + WHITEOUT.len()
            || (part.len() > NAME_BYTES && !part.starts_with(WHITEOUT))
        {
            return Err(refused(path, "a name in its path is longer than 255 bytes"));
        }
        if index >= depth {
            return Err(refused(path, "it lies too deep"));
        }
        if index > 0 {
            clean.push(b'/');
        }
        clean.extend_from_slice(part);
    }
    if clean.len() > PATH_BYTES {
        return Err(refused(path, "its path is longer than 4095 bytes"));
    }
    Ok(clean)
}

pub(super) fn split(path: &[u8]) -> Place<'_> {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => Place { folder: &path[..slash], name: &path[slash + 1..] },
        None => Place { folder: b"", name: path },
    }
}

pub(super) fn refused(path: &[u8], why: &'static str) -> UnpackError {
    UnpackError::Refused { entry: shown(path), why }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        /// What is let through has no part that leads anywhere but down, and means the same when it is read again.
        #[test]
        fn what_is_clean_leads_down(path in "[./a\\x00]{0,40}") {
            if let Ok(clean_path) = clean(path.as_bytes(), 10) {
                let text = std::str::from_utf8(&clean_path).unwrap();
                let is_name = |part: &str| !matches!(part, "" | "." | "..") && !part.contains('\0');
                proptest::prop_assert!(text.is_empty() || text.split('/').all(is_name), "{}", text);
                let place = split(&clean_path);
                proptest::prop_assert_eq!(&place.path(), &clean_path);
                if !text.is_empty() {
                    proptest::prop_assert_eq!(clean(&clean_path, 10).unwrap(), clean_path);
                }
            }
        }
    }
}
