//! Plants the faults of every suite in its kernel, one after the other: each must be found by a case of the suite.

use std::io::Write;

use crate::SUITES;
use crate::lab::Lab;

#[test]
fn every_planted_fault_is_found() {
    let mut survivors = Vec::new();
    for suite in &SUITES {
        assert!(!suite.faults.is_empty(), "{} has no faults to find", suite.source.name);
        for &fault in suite.faults {
            assert_eq!(fault.source, suite.source.name, "\"{}\" is of another source", fault.fault);
            // A fault that does not compile says nothing about the cases.
            fault.compile(&suite.source).unwrap();
            let lab = Lab::faulty(fault);
            let finder = suite.cases.iter().find_map(|(name, case)| Some((name, case(&lab).err()?)));
            // Not captured by the test harness: the list is what this test is for.
            let mut out = std::io::stdout().lock();
            let line = match &finder {
                Some((case, message)) => format!("found by \"{case}\": {message}"),
                None => "NOT FOUND".to_owned(),
            };
            writeln!(out, "{}: {}: {line}", suite.source.name, fault.fault).unwrap();
            if finder.is_none() {
                survivors.push(format!("{}: {}", suite.source.name, fault.fault));
            }
        }
    }
    assert!(survivors.is_empty(), "no case finds {survivors:#?}");
}
