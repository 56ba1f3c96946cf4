//! Measures what each command took of CPU, memory and storage.
//!
//! While the shell lives, its own and its waited-for children's CPU time comes from `/proc` in clock ticks (10 ms), and what
//! they read and wrote from its `io`; its end brings exact figures for the whole, so a sum over an action's commands is
//! exact. Peak memory is known only of the whole: the kernel keeps one largest size for all the children a shell has
//! waited for, which nobody else can read or reset while the shell lives. So it is told only of an action that ran a
//! single command.

use std::fs;
use std::time::Duration;

use sealci_guest::wire::Usage;

use crate::kinfolk::fields_after_name;
use crate::sys::{self, Reaped};

/// Sums up what the shell and the orphans it left took.
pub struct Meter {
    shell: i32,
    orphans: Totals,
    /// What is reported already.
    reported: Totals,
    commands: u32,
}

/// What only grows.
#[derive(Debug, Clone, Copy, Default)]
struct Totals {
    cpu_user: Duration,
    cpu_system: Duration,
    read_bytes: u64,
    write_bytes: u64,
}

impl Totals {
    fn of(child: &Reaped) -> Self {
        Self {
            cpu_user: child.cpu_user,
            cpu_system: child.cpu_system,
            read_bytes: child.read_bytes,
            write_bytes: child.write_bytes,
        }
    }

    /// Field by field.
    fn combined<D: Fn(Duration, Duration) -> Duration, B: Fn(u64, u64) -> u64>(
        self,
        other: Self,
        durations: D,
        bytes: B,
    ) -> Self {
        Self {
            cpu_user: durations(self.cpu_user, other.cpu_user),
            cpu_system: durations(self.cpu_system, other.cpu_system),
            read_bytes: bytes(self.read_bytes, other.read_bytes),
            write_bytes: bytes(self.write_bytes, other.write_bytes),
        }
    }

    fn plus(self, other: Self) -> Self {
        self.combined(other, Duration::saturating_add, u64::saturating_add)
    }

    fn minus(self, other: Self) -> Self {
        self.combined(other, Duration::saturating_sub, u64::saturating_sub)
    }
}

impl Meter {
    pub fn new(shell: i32) -> Self {
        Self { shell, orphans: Totals::default(), reported: Totals::default(), commands: 0 }
    }

    pub fn add_orphan(&mut self, orphan: &Reaped) {
        self.orphans = self.orphans.plus(Totals::of(orphan));
    }

    /// What the command took that ends now, the shell going on.
    pub fn sample(&mut self) -> Usage {
        let shell = self.read_totals();
        self.report(shell, 0)
    }

    /// What the command took with which the shell ended.
    pub fn last(&mut self, shell: &Reaped) -> Usage {
        let peak = if self.commands == 0 { shell.memory_peak_bytes } else { 0 };
        self.report(Totals::of(shell), peak)
    }

    fn report(&mut self, shell: Totals, memory_peak_bytes: u64) -> Usage {
        let total = shell.plus(self.orphans);
        let new = total.minus(self.reported);
        // The figures come from two clocks; none of them runs backwards for that.
        self.reported = total.combined(self.reported, Duration::max, u64::max);
        self.commands += 1;
        Usage {
            cpu_user_us: micros(new.cpu_user),
            cpu_system_us: micros(new.cpu_system),
            memory_peak_bytes,
            read_bytes: new.read_bytes,
            write_bytes: new.write_bytes,
        }
    }

    fn read_totals(&self) -> Totals {
        let read = |name: &str| fs::read(format!("/proc/{}/{name}", self.shell)).unwrap_or_default();
        let (cpu_user, cpu_system) = cpu_of(&read("stat")).unwrap_or_default();
        let (read_bytes, write_bytes) = storage_of(&read("io"));
        Totals { cpu_user, cpu_system, read_bytes, write_bytes }
    }
}

/// Fields 14 to 17 of proc_pid_stat(5): utime, stime, cutime, cstime.
fn cpu_of(stat: &[u8]) -> Option<(Duration, Duration)> {
    let mut ticks = fields_after_name(stat)?.skip(11).map(|field| field.parse::<u64>().ok());
    let mut next = || ticks.next().flatten();
    let (user, system, children_user, children_system) = (next()?, next()?, next()?, next()?);
    let duration = |ticks: u64| Duration::from_micros(ticks * 1_000_000 / sys::ticks_per_second());
    Some((duration(user + children_user), duration(system + children_system)))
}

/// `read_bytes` and `write_bytes` of proc_pid_io(5), 0 where they cannot be had.
fn storage_of(io: &[u8]) -> (u64, u64) {
    let text = std::str::from_utf8(io).unwrap_or_default();
    let field = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        value.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    (field("read_bytes"), field("write_bytes"))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_is_read_as_the_kernel_writes_it() {
        let io = b"rchar: 1\nwchar: 2\nsyscr: 3\nsyscw: 4\nread_bytes: 4096\nwrite_bytes: 8192\ncancelled_write_bytes: 5\n";
        assert_eq!(storage_of(io), (4096, 8192));
        assert_eq!(storage_of(b""), (0, 0));
        assert_eq!(storage_of(b"read_bytes: x\n\xff"), (0, 0));
    }
}
