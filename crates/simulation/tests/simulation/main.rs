//! Plays histories: many of them from seeds, and a fixed one in which somebody dies at each place where that could matter.

mod edges;
mod histories;
