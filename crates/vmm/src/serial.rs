//! The guest's first serial line, for people who look for what goes wrong: it is written, never read.

use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Device;

/// Where what the guest prints goes.
pub type Output = Box<dyn Write + Send>;

/// A 16550 without input.
pub struct SerialLine(Mutex<Port>);

type Port = Serial<Interrupt, NoEvents, Output>;

/// Tells KVM, which tells the guest.
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl SerialLine {
    pub fn new(interrupt: EventFd, output: Output) -> Self {
        Self(Mutex::new(Serial::new(Interrupt(interrupt), output)))
    }

    /// Goes on where another was.
    pub fn go_on(interrupt: EventFd, output: Output, state: &SerialState) -> io::Result<Self> {
        let port = Serial::from_state(state, Interrupt(interrupt), NoEvents, output);
        let port = port.map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(Self(Mutex::new(port)))
    }

    pub fn state(&self) -> SerialState {
        self.lock().state()
    }

    /// A thread that panicked with the lock has ended the machine.
    fn lock(&self) -> MutexGuard<'_, Port> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for SerialLine {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // Its registers have a byte each; there are eight.
        match data {
            [byte] => *byte = self.lock().read(offset as u8),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Whoever reads it may be gone, which is no reason for the guest to stop.
        if let [byte] = data {
            let _ = self.lock().write(offset as u8, *byte);
        }
    }
}
