//! What the tests of services share: databases to test on, a disk that can be filled, and how to say what was not tested.
//! Not for production.
#![allow(clippy::unwrap_used)] // what fails here should fail the test

use std::path::{Path, PathBuf};
use std::process::Command;

use sea_orm::ConnectionTrait as _;

use crate::database::DatabaseUrl;

/// Says loudly what was not tested; the file that `SEALCI_SKIPS` names collects it for the end of the test command.
pub fn skipped(what: &str, why: &str) {
    use std::io::Write as _;
    eprintln!("SKIPPED: {what}: {why}");
    if let Ok(path) = std::env::var("SEALCI_SKIPS") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        writeln!(file.unwrap(), "{what}: {why}").unwrap();
    }
}

/// A schema of its own on the PostgreSQL server that `SEALCI_TEST_POSTGRES` names. None, loudly, where it names none.
pub async fn postgres(service: &str) -> Option<DatabaseUrl> {
    let Ok(url) = std::env::var("SEALCI_TEST_POSTGRES") else {
        skipped(&format!("{service} on PostgreSQL"), "SEALCI_TEST_POSTGRES names no server");
        return None;
    };
    let schema = format!("test_{:032x}", rand::random::<u128>());
    let connection = sea_orm::Database::connect(&url).await.unwrap();
    connection.execute_unprepared(&format!("CREATE SCHEMA {schema}")).await.unwrap();
    let separator = if url.contains('?') { '&' } else { '?' };
    Some(DatabaseUrl::Postgres(format!("{url}{separator}options=-c%20search_path%3D{schema}")))
}

/// A small file system of its own, unmounted at the end.
#[derive(Debug)]
pub struct SmallDisk {
    folder: tempfile::TempDir,
}

impl SmallDisk {
    /// `size` is as `mount` has it: `4m`. None, loudly, where no file system can be mounted.
    pub fn mount(size: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(folder.path())
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self { folder });
        }
        skipped("a full disk under a database", "a file system can be mounted by root only");
        None
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Takes all the room there is; the file that took it.
    pub fn fill(&self) -> PathBuf {
        let filler = self.path().join("filler");
        let mut file = std::fs::File::create(&filler).unwrap();
        let block = [0_u8; 4096];
        while std::io::Write::write(&mut file, &block).is_ok() {}
        filler
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a failed test may leave the database open.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}
