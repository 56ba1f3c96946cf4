//! Makes initial RAM disks: a busybox, a script that it runs as the guest's first process, and what goes with it.
//!
//! The format is cpio's "newc" (Documentation/driver-api/early-userspace/buffer-format.rst of Linux).

use std::fs;
use std::io::Write;
use std::path::Path;

use tempfile::NamedTempFile;

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// Begins every script.
const PROLOGUE: &str = "#!/bin/busybox sh\n\
    /bin/busybox --install -s /bin\n\
    mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev\n";

/// One on its way.
pub struct Initramfs {
    bytes: Vec<u8>,
    entries: u32,
}

impl Initramfs {
    /// With nothing in it that runs.
    pub fn empty() -> Self {
        let mut new = Self { bytes: Vec::new(), entries: 0 };
        for folder in ["bin", "dev", "proc", "sys", "tmp", "modules"] {
            new.add(folder, FOLDER, b"");
        }
        new
    }

    /// Whose first process is a shell that runs such a script.
    pub fn running(busybox: &Path, script: &str) -> Self {
        Self::only(busybox, &format!("{PROLOGUE}{script}"))
    }

    /// Likewise, but nothing was mounted before.
    pub fn only(busybox: &Path, script: &str) -> Self {
        let mut new = Self::empty();
        new.add("bin/busybox", PROGRAM, &fs::read(busybox).unwrap());
        new.add("init", PROGRAM, script.as_bytes());
        new
    }

    pub fn with(mut self, name: &str, bytes: &[u8]) -> Self {
        self.add(name, PROGRAM, bytes);
        self
    }

    pub fn file(mut self) -> NamedTempFile {
        self.add("TRAILER!!!", 0, b"");
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&self.bytes).unwrap();
        file
    }

    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let mut header = String::from("070701");
        let (length, name_bytes) = (content.len() as u32, name.len() as u32 + 1);
        for field in [self.entries, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, name_bytes, 0] {
            header.push_str(&format!("{field:08x}"));
        }
        self.bytes.extend(header.bytes());
        self.bytes.extend(name.bytes().chain([0]));
        self.align();
        self.bytes.extend(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
