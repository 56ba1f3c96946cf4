//! Measures what each command took of CPU and memory.
//!
//! While the shell lives, its own and its waited-for children's CPU time comes from `/proc` in clock ticks (10 ms); its end
//! brings exact figures for the whole, so a sum over an action's commands is exact. Peak memory is known only of the whole,
//! and so told only of an action that ran a single command.

use std::fs;
use std::time::Duration;

use sealci_guest::wire::Usage;

use crate::kinfolk::fields_after_name;
use crate::sys::{self, Reaped};

/// Sums up what the shell and the orphans it left took.
pub struct Meter {
    shell: i32,
    orphans: Cpu,
    /// What is reported already.
    reported: Cpu,
    commands: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Cpu {
    user: Duration,
    system: Duration,
}

impl Meter {
    pub fn new(shell: i32) -> Self {
        Self { shell, orphans: Cpu::default(), reported: Cpu::default(), commands: 0 }
    }

    pub fn add_orphan(&mut self, orphan: &Reaped) {
        self.orphans.user += orphan.cpu_user;
        self.orphans.system += orphan.cpu_system;
    }

    /// What the command took that ends now, the shell going on.
    pub fn sample(&mut self) -> Usage {
        let shell = self.read_stat().unwrap_or_default();
        self.report(shell, 0)
    }

    /// What the command took with which the shell ended.
    pub fn last(&mut self, shell: &Reaped) -> Usage {
        let peak = if self.commands == 0 { shell.memory_peak_bytes } else { 0 };
        self.report(Cpu { user: shell.cpu_user, system: shell.cpu_system }, peak)
    }

    fn report(&mut self, shell: Cpu, memory_peak_bytes: u64) -> Usage {
        let user = shell.user + self.orphans.user;
        let system = shell.system + self.orphans.system;
        let usage = Usage {
            cpu_user_us: micros(user.saturating_sub(self.reported.user)),
            cpu_system_us: micros(system.saturating_sub(self.reported.system)),
            memory_peak_bytes,
        };
        self.reported = Cpu { user: user.max(self.reported.user), system: system.max(self.reported.system) };
        self.commands += 1;
        usage
    }

    /// Fields 14 to 17 of proc_pid_stat(5): utime, stime, cutime, cstime.
    fn read_stat(&self) -> Option<Cpu> {
        let stat = fs::read(format!("/proc/{}/stat", self.shell)).ok()?;
        let mut ticks = fields_after_name(&stat)?.skip(11).map(|field| field.parse::<u64>().ok());
        let mut next = || ticks.next().flatten();
        let (user, system, children_user, children_system) = (next()?, next()?, next()?, next()?);
        let duration = |ticks: u64| Duration::from_micros(ticks * 1_000_000 / sys::ticks_per_second());
        Some(Cpu { user: duration(user + children_user), system: duration(system + children_system) })
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
