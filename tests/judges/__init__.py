"""How the operators of a stem are judged, wherever they run. Each check takes the operator as its first argument."""
