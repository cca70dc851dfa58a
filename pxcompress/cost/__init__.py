"""What a model costs at any widths: parameters and MACs counted, milliseconds from operators that were measured."""
