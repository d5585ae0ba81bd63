//! Everything that needs a cluster, root and minutes: one test at a time.

mod agent;
mod demo;
mod faults;
mod install;
mod tools;
