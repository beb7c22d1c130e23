"""What is written so that a run can be resumed, or exported as a plain PEFT adapter."""
