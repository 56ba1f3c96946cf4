//! Passes on what a program beside the commands reads and writes, a piece at a time.
//!
//! Invariant: of input and outputs no more than a window is under way, so a program that does not read, or a host that does not,
//! holds up itself alone.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read as _, Write as _};

use sealci_guest::wire::{EXEC_WINDOW_PIECES, MAX_EXEC_PIECE_BYTES, WireError};

/// What a program wrote.
pub struct Piece {
    pub id: u32,
    /// To standard error.
    pub is_error: bool,
    pub bytes: Vec<u8>,
}

/// What reading found.
pub enum Read {
    Piece {
        is_error: bool,
        bytes: Vec<u8>,
    },
    /// Not now.
    Nothing,
    /// Nor ever.
    End,
}

pub struct Flow {
    /// None: nobody reads it any more, or its end was passed on.
    input: Option<File>,
    /// Not passed on yet. An empty piece is the end.
    waiting: VecDeque<Vec<u8>>,
    /// Of the first.
    written: usize,
    /// Pieces passed on, and not told of.
    passed_on: usize,
    /// Standard output and standard error, while they have an end that can be written to.
    outputs: [Option<File>; 2],
    /// Pieces told, and not passed on by the host.
    under_way: usize,
}

impl Flow {
    /// Neither input nor outputs wait.
    pub fn new(input: File, outputs: [File; 2]) -> Self {
        Self {
            input: Some(input),
            waiting: VecDeque::new(),
            written: 0,
            passed_on: 0,
            outputs: outputs.map(Some),
            under_way: 0,
        }
    }

    /// Those that are to be polled for.
    pub fn open_outputs(&self) -> impl Iterator<Item = (usize, &File)> {
        let has_room = self.under_way < EXEC_WINDOW_PIECES;
        let open = self.outputs.iter().enumerate().filter(move |_| has_room);
        open.filter_map(|(place, output)| Some((place, output.as_ref()?)))
    }

    /// Where there is something to write.
    pub fn input(&self) -> Option<&File> {
        self.input.as_ref().filter(|_| !self.waiting.is_empty())
    }

    pub fn receive(&mut self, bytes: Vec<u8>) -> Result<(), WireError> {
        if self.waiting.len() >= EXEC_WINDOW_PIECES || bytes.len() > MAX_EXEC_PIECE_BYTES {
            return Err(WireError::Invalid("input, which is more than there is room for,"));
        }
        self.waiting.push_back(bytes);
        self.pass_on();
        Ok(())
    }

    /// Writes what the program takes without waiting.
    pub fn pass_on(&mut self) {
        while let Some(piece) = self.waiting.front() {
            let Some(input) = &mut self.input else {
                // Nobody's any more.
                self.passed();
                continue;
            };
            if piece.is_empty() {
                self.input = None;
                continue;
            }
            match input.write(&piece[self.written..]) {
                Ok(count) => {
                    self.written += count;
                    if self.written == piece.len() {
                        self.passed();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.input = None,
            }
        }
    }

    fn passed(&mut self) {
        self.waiting.pop_front();
        self.written = 0;
        self.passed_on += 1;
    }

    /// Whether the host is to be told of one more piece that was passed on.
    pub fn tell_passed_on(&mut self) -> bool {
        let has_more = self.passed_on > 0;
        self.passed_on = self.passed_on.saturating_sub(1);
        has_more
    }

    /// The host has passed on a piece.
    pub fn taken(&mut self) {
        self.under_way = self.under_way.saturating_sub(1);
    }

    /// Reads a piece of one output.
    pub fn read(&mut self, place: usize) -> Read {
        let Some(output) = &mut self.outputs[place] else { return Read::End };
        let mut bytes = vec![0; MAX_EXEC_PIECE_BYTES];
        match output.read(&mut bytes) {
            Ok(count) if count > 0 => {
                bytes.truncate(count);
                self.under_way += 1;
                Read::Piece { is_error: place == 1, bytes }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Read::Nothing
            }
            _ => {
                self.outputs[place] = None;
                Read::End
            }
        }
    }

    /// Reads a piece of what is left once the program has ended; what it left behind may go on writing, and is not waited for.
    /// None: there is no room for it now.
    pub fn rest(&mut self) -> Option<Read> {
        if self.under_way >= EXEC_WINDOW_PIECES {
            return None;
        }
        for place in 0..self.outputs.len() {
            if let piece @ Read::Piece { .. } = self.read(place) {
                return Some(piece);
            }
        }
        Some(Read::End)
    }
}
