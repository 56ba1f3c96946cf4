//! Changes the owners of a tree, for an agent that may not do so itself but may have it done in a container.

use std::fs;
use std::io;
use std::os::unix::fs::lchown;
use std::path::Path;

/// Gives a folder and all below it to `UID:GID`. Links are changed, not followed.
pub fn give(owner: &str, folder: &Path) -> io::Result<()> {
    let unreadable = || io::Error::new(io::ErrorKind::InvalidInput, format!("`{owner}` is not UID:GID"));
    let (uid, gid) = owner.split_once(':').ok_or_else(unreadable)?;
    let (uid, gid) = (uid.parse().map_err(|_| unreadable())?, gid.parse().map_err(|_| unreadable())?);
    let mut waiting = vec![folder.to_owned()];
    while let Some(path) = waiting.pop() {
        lchown(&path, Some(uid), Some(gid)).map_err(|error| {
            io::Error::new(error.kind(), format!("cannot give {}: {error}", path.display()))
        })?;
        if fs::symlink_metadata(&path)?.is_dir() {
            for entry in fs::read_dir(&path)? {
                waiting.push(entry?.path());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_two_numbers() {
        for owner in ["", "1", "1:", ":1", "a:b", "-1:1", "1:1:1"] {
            assert_eq!(
                give(owner, Path::new("/nowhere")).unwrap_err().kind(),
                io::ErrorKind::InvalidInput,
                "{owner}"
            );
        }
        assert_eq!(give("1:1", Path::new("/nowhere")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
