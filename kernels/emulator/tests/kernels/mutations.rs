//! Plants the faults of every suite in its kernel, one after the other: each must be found by a case of the suite.

use std::io::Write;
use std::sync::Mutex;
use std::thread;

use nibble_kernel_emulator::mutations::Mutation;

use crate::SUITES;
use crate::lab::{Lab, Suite};

#[test]
fn every_planted_fault_is_found() {
    for suite in &SUITES {
        assert!(!suite.faults.is_empty(), "{} has no faults to find", suite.source.name);
    }
    let faults = SUITES.iter().flat_map(|suite| suite.faults.iter().map(move |&fault| (suite, fault)));
    let (faults, survivors) = (Mutex::new(faults), Mutex::new(Vec::new()));
    let next = || faults.lock().unwrap().next();
    let work = || {
        while let Some((suite, fault)) = next() {
            let (line, found) = look_for(suite, fault);
            // Not captured by the test harness: the list is what this test is for.
            writeln!(std::io::stdout().lock(), "{line}").unwrap();
            if !found {
                survivors.lock().unwrap().push(line);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let survivors = survivors.into_inner().unwrap();
    assert!(survivors.is_empty(), "{survivors:#?}");
}

/// A line that says who finds the fault, and whether somebody does.
fn look_for(suite: &Suite, fault: Mutation) -> (String, bool) {
    assert_eq!(fault.source, suite.source.name, "\"{}\" is of another source", fault.fault);
    let lab = Lab::faulty(fault);
    // A fault that does not compile says nothing about the cases.
    lab.emulator(0).compile(suite.source).unwrap();
    let finder = suite.cases.iter().find_map(|(name, case)| Some((name, case(&lab).err()?)));
    let (source, fault) = (suite.source.name, fault.fault);
    match finder {
        Some((case, message)) => (format!("{source}: {fault}: found by \"{case}\": {message}"), true),
        None => (format!("{source}: {fault}: NOT FOUND by any case"), false),
    }
}
