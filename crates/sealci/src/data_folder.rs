//! Keeps what `sealci up` leaves behind in one folder: secrets, databases, and `client.json`, by which the other
//! commands find the running server.
//!
//! The folder is for its owner alone (0700), every secret is a file of mode 0600, and a file appears whole or not at all.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sealci_service::auth::{Token, TokenError};
use serde::{Deserialize, Serialize};

use crate::exit::{Exit, Failure};

/// A data folder that cannot be found, read or written.
#[derive(Debug, thiserror::Error)]
pub enum DataFolderError {
    #[error("no data folder: neither --data nor XDG_DATA_HOME nor HOME is set; give one with --data DIR")]
    Nowhere,
    #[error(transparent)]
    Secret(#[from] TokenError),
    #[error("cannot {doing} {path}")]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is not what `sealci up` writes; stop it, delete the file and start it again")]
    Malformed {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

/// How the client commands reach the server that runs on this data folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientFile {
    /// The controller's base URL.
    pub controller: String,
    /// The monitor's base URL.
    pub monitor: String,
    pub token: String,
}

/// The one folder of a server on this machine.
#[derive(Debug, Clone)]
pub struct DataFolder {
    root: PathBuf,
}

impl DataFolder {
    /// The given folder, else `$XDG_DATA_HOME/sealci`, else `~/.local/share/sealci`.
    pub fn locate(given: Option<&Path>) -> Result<Self, DataFolderError> {
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let root = match given {
            Some(path) => path.to_owned(),
            None => absolute("XDG_DATA_HOME")
                .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
                .ok_or(DataFolderError::Nowhere)?
                .join("sealci"),
        };
        Ok(Self { root })
    }

    /// The folder, made if it is not there.
    pub fn open(given: Option<&Path>) -> Result<Self, Failure> {
        let mut folder = Self::locate(given).map_err(Self::failure)?;
        folder.create().map_err(Self::failure)?;
        Ok(folder)
    }

    /// What trouble with it means for a command.
    pub fn failure(error: DataFolderError) -> Failure {
        Failure::of_error(Exit::Infrastructure, "the data folder", &error)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes the folder, and the absolute path of it.
    pub fn create(&mut self) -> Result<(), DataFolderError> {
        let failed = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| DataFolderError::Io { doing, path, source }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.root)
            .map_err(failed("make the data folder", &self.root))?;
        self.root = fs::canonicalize(&self.root).map_err(failed("find the data folder", &self.root))?;
        Ok(())
    }

    /// The secret of this name, made at the first call. Two processes that make it at the same time get the same one.
    pub fn secret(&self, name: &str) -> Result<Token, DataFolderError> {
        let path = self.path(name);
        let failed = |doing, source| DataFolderError::Io { doing, path: path.clone(), source };
        if !path.try_exists().map_err(|source| failed("look for", source))? {
            let token = Token::generate()?;
            let new = self.path(&format!(".{name}.{}", std::process::id()));
            write_whole(&new, format!("{}\n", token.expose()).as_bytes())
                .map_err(|source| failed("write", source))?;
            // Unlike a rename, a link never replaces what another process has put there meanwhile.
            let linked = fs::hard_link(&new, &path).or_else(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => Ok(()),
                _ => Err(error),
            });
            let _ = fs::remove_file(&new);
            linked
                .and_then(|()| File::open(&self.root)?.sync_all())
                .map_err(|source| failed("write", source))?;
        }
        Ok(Token::from_file(&path)?)
    }

    /// Writes a file of mode 0600 that appears whole, and is on disk when this returns.
    pub fn write_private(&self, name: &str, content: &[u8]) -> Result<(), DataFolderError> {
        let path = self.path(name);
        let new = self.path(&format!(".{name}.new"));
        let write = || -> io::Result<()> {
            write_whole(&new, content)?;
            fs::rename(&new, &path)?;
            File::open(&self.root)?.sync_all()
        };
        write().map_err(|source| DataFolderError::Io { doing: "write", path: path.clone(), source })
    }

    /// Reads `client.json`; none if no server has ever run here.
    pub fn client_file(&self) -> Result<Option<ClientFile>, DataFolderError> {
        let path = self.path("client.json");
        match fs::read(&path) {
            Ok(text) => match serde_json::from_slice(&text) {
                Ok(file) => Ok(Some(file)),
                Err(source) => Err(DataFolderError::Malformed { path, source }),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(DataFolderError::Io { doing: "read", path, source }),
        }
    }

    pub fn write_client_file(&self, file: &ClientFile) -> Result<(), DataFolderError> {
        let text = serde_json::to_vec_pretty(file)
            .map_err(|source| DataFolderError::Malformed { path: self.path("client.json"), source })?;
        self.write_private("client.json", &text)
    }
}

/// A new file of mode 0600, on disk when this returns.
fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let _ = fs::remove_file(path);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn secrets_are_made_once_and_for_their_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut folder = DataFolder::locate(Some(&dir.path().join("a/b"))).unwrap();
        folder.create().unwrap();
        let first = folder.secret("admin.token").unwrap();
        assert!(first.expose().starts_with(Token::PREFIX));
        assert_eq!(folder.secret("admin.token").unwrap().expose(), first.expose());
        assert_ne!(folder.secret("cluster.secret").unwrap().expose(), first.expose());
        assert_eq!(fs::read_dir(folder.root()).unwrap().count(), 2, "nothing half-made is left");
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(folder.path("admin.token")), 0o600);
        assert_eq!(mode(folder.root().to_owned()), 0o700);
    }

    #[test]
    fn the_client_file_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut folder = DataFolder::locate(Some(dir.path())).unwrap();
        folder.create().unwrap();
        assert_eq!(folder.client_file().unwrap(), None);
        let file =
            ClientFile { controller: "http://a".into(), monitor: "http://b".into(), token: "t".into() };
        folder.write_client_file(&file).unwrap();
        assert_eq!(folder.client_file().unwrap(), Some(file));
        fs::write(folder.path("client.json"), "{").unwrap();
        assert!(matches!(folder.client_file(), Err(DataFolderError::Malformed { .. })));
    }
}
