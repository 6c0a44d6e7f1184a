//! The wording of synthetic completions: alternatives by slot. Their product makes the completions of a group differ.

/// First sentence.
pub const OPENERS: [&str; 8] = [
    "Let me work through this problem.",
    "I will solve this step by step.",
    "First, look at what is given.",
    "We need to find the requested number.",
    "Okay, this is a word problem.",
    "To answer this, follow the quantities.",
    "Start with the facts in the question.",
    "Here is how I think about it.",
];

/// Second sentence.
pub const PLANS: [&str; 8] = [
    "The plan is to compute each part.",
    "I keep track of every amount.",
    "Each line below is one calculation.",
    "My numbers come from the text.",
    "Only a few operations are needed.",
    "Now I write the steps down.",
    "That means doing the sums in order.",
    "Nothing else matters here.",
];

/// In front of a calculation.
pub const CONNECTORS: [&str; 8] = ["So ", "Then ", "Next, ", "We get ", "This gives ", "Now ", "Compute ", "That is "];

/// Behind the calculations.
pub const CHECKS: [&str; 8] = [
    "A quick check agrees.",
    "These steps look right.",
    "I read the question again and it fits.",
    "Every quantity has been used.",
    "No other operation remains.",
    "It seems reasonable.",
    "Looking back, the units match.",
    "All parts are covered now.",
];

/// Last sentence; `{}` stands for the answer.
pub const CLOSERS: [&str; 8] = [
    "The answer is {}.",
    "So the result is {}.",
    "Therefore we have {}.",
    "This makes {} in total.",
    "Hence {} is the final number.",
    "In the end there are {}.",
    "I conclude that it is {}.",
    "My final value is {}.",
];
