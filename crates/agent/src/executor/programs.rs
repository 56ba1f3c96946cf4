//! Puts the static programs that the agent carries where they can be executed.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::ExecutorError;

/// A program, built for the machine this agent is built for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Program {
    name: &'static str,
    pub bytes: &'static [u8],
}

/// What runs an action's commands.
pub(super) const INIT: Program =
    Program { name: "sealci-init", bytes: include_bytes!(env!("SEALCI_INIT_BINARY")) };

/// The virtual machine monitor: a static program.
pub const MONITOR_PROGRAM: &[u8] = include_bytes!(env!("SEALCI_VMM_BINARY"));

/// What runs a machine.
pub(super) const VMM: Program = Program { name: "sealci-vmm", bytes: MONITOR_PROGRAM };

/// Writes `<data_dir>/bin/<name>-<checksum>`, unless it is there. What a former process was killed over goes.
pub(super) fn install(data_dir: &Path, program: Program) -> Result<PathBuf, ExecutorError> {
    let Program { name, bytes } = program;
    // It only keeps versions apart: what is there is compared as a whole.
    let checksum = crc32fast::hash(bytes);
    let folder = data_dir.join("bin");
    let path = folder.join(format!("{name}-{checksum:08x}"));
    let partial = format!(".{name}-");
    remove_leftovers(&folder, &partial);
    if fs::read(&path).is_ok_and(|there| there == bytes) {
        return Ok(path);
    }
    let write = || {
        fs::create_dir_all(&folder)?;
        // Its own name for each process: two that start together do not write into one file.
        let partial = folder.join(format!("{partial}{}", std::process::id()));
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o755).open(&partial)?;
        file.write_all(bytes)?;
        // Whatever the umask is.
        file.set_permissions(fs::Permissions::from_mode(0o755))?;
        // Not synced: what a crash leaves of it is found to be broken at the next start.
        drop(file);
        fs::rename(&partial, &path)
    };
    write().map_err(ExecutorError::io(format_args!("write {}", path.display())))?;
    Ok(path)
}

/// Removes what processes that are dead have begun to write: the prefix, and the number of who writes.
fn remove_leftovers(folder: &Path, prefix: &str) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let writer = name.to_str().and_then(|name| name.strip_prefix(prefix)?.parse::<u32>().ok());
        if writer.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            // One that stays is in nobody's way.
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_process_was_writing_goes_with_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let bin = folder.path().join("bin");
        fs::create_dir(&bin).unwrap();
        let mut dead = std::process::Command::new("true").spawn().unwrap();
        dead.wait().unwrap();
        let own = format!(".sealci-init-{}", std::process::id());
        let theirs = format!(".sealci-init-{}", dead.id());
        for name in [&own, &theirs, ".sealci-init-", ".sealci-init-x", "other"] {
            fs::write(bin.join(name), "half").unwrap();
        }
        for _ in ["where the init is missing", "where it is there"] {
            fs::write(bin.join(&theirs), "half").unwrap();
            let init = install(folder.path(), INIT).unwrap();
            let mut names: Vec<_> = fs::read_dir(&bin)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .filter(|name| *name != own && !init.ends_with(name))
                .collect();
            names.sort();
            assert_eq!(names, [".sealci-init-", ".sealci-init-x", "other"]);
        }
    }
}
