//! Gives a controller's process its identity among the replicas, and remembers it for the next one on the same data folder.
//!
//! Who holds the folder's lock knows that the process before it is gone, and may take over what that one owned at once,
//! without waiting for its lease to run out. Two processes on one folder are two replicas all the same: the second only does not
//! know whom it follows.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use sealci_core::ids::ReplicaId;
use uuid::Uuid;

/// Who this process is.
#[derive(Debug)]
pub struct Replica {
    id: ReplicaId,
    /// Locked; none where another process has it.
    file: Option<File>,
}

impl Replica {
    /// Of a process that has its database alone: nobody follows it.
    pub fn alone() -> Self {
        Self { id: Self::fresh(), file: None }
    }

    /// A new identity, and that of the process before, if it is known and gone.
    pub fn new(data: &Path) -> io::Result<(Self, Option<ReplicaId>)> {
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).read(true).write(true).mode(0o600);
        let mut file = options.open(data.join("replica"))?;
        let mut replica = Self { id: Self::fresh(), file: None };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok((replica, None)),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let mut former = String::new();
        (&mut file).take(64).read_to_string(&mut former)?;
        replica.file = Some(file);
        replica.remember()?;
        Ok((replica, former.trim().parse().ok()))
    }

    pub fn id(&self) -> ReplicaId {
        self.id
    }

    /// An id that nobody ever had.
    pub fn fresh() -> ReplicaId {
        ReplicaId::from_uuid(Uuid::now_v7())
    }

    /// Becomes another: the one before lost its lease, and has none again.
    pub fn become_another(&mut self, id: ReplicaId) {
        self.id = id;
        if let Err(error) = self.remember() {
            tracing::warn!(%error, "the replica's identity cannot be written down; its successor will have to wait");
        }
    }

    fn remember(&mut self) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        file.rewind()?;
        // Always of one length: what stood there before is replaced whole.
        file.write_all(format!("{}\n", self.id).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_knows_who_was_there_and_a_neighbour_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let (first, before) = Replica::new(folder.path()).unwrap();
        assert_eq!(before, None);
        let (neighbour, before) = Replica::new(folder.path()).unwrap();
        assert_eq!(before, None, "the first one lives");
        assert_ne!(first.id(), neighbour.id());
        let former = first.id();
        drop((first, neighbour));
        let (mut second, before) = Replica::new(folder.path()).unwrap();
        assert_eq!(before, Some(former));
        let former = Replica::fresh();
        second.become_another(former);
        drop(second);
        assert_eq!(Replica::new(folder.path()).unwrap().1, Some(former));
    }
}
